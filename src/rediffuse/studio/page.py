"""The layout of the page, and which click does what."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np

from rediffuse.build import names
from rediffuse.data.decoding import SUFFIXES
from rediffuse.errors import RediffuseError
from rediffuse.runs import find_run
from rediffuse.studio import acts, shelf, showing
from rediffuse.studio.asking import Asked, Edit, Square, mask_of
from rediffuse.studio.desk import Desk

Values = dict[Any, Any]
"""What components say, by component."""

_NEVER_CALLED_FROM_OUTSIDE = {"api_visibility": "private", "show_progress": "hidden"}
_DRAWS = {
    **_NEVER_CALLED_FROM_OUTSIDE,
    "concurrency_limit": 1,  # the machine draws one after another
    "concurrency_id": "draw",
}
_AT_ONCE = {**_NEVER_CALLED_FROM_OUTSIDE, "queue": False}
_LOOK_EVERY_S = 5.0
_MASK = "#e69f00"
_THE_SAME = ("the same", "")


class Panel(NamedTuple):
    """The fields of one setting; their names are those of `Asked`."""

    checkpoint: gr.Dropdown
    weights: gr.Dropdown
    solver: gr.Dropdown
    steps: gr.Number
    guidance: gr.Number
    class_name: gr.Dropdown

    def asked(self, values: Values, run: str | None, **more: Any) -> Asked:
        """What they say."""
        said = {name: values[part] for name, part in zip(self._fields, self, strict=True)}
        return Asked(run=run, **{**said, **more})


class Seeds(NamedTuple):
    """Which images, and of which set."""

    seeds: gr.Textbox
    seed: gr.Number

    def said(self, values: Values) -> Values:
        """What they say, by the names of `Asked`."""
        return {name: values[part] for name, part in zip(self._fields, self, strict=True)}


class Chosen(NamedTuple):
    """The run that the page is on, the one beside it, and what is said of the first."""

    run: gr.Dropdown
    second: gr.Dropdown
    line: gr.HTML


def build(desk: Desk) -> gr.Blocks:
    """Lay the page out."""
    with gr.Blocks(
        title="Rediffuse studio",
        analytics_enabled=False,
        delete_cache=(600, 3600),
        fill_width=True,
    ) as page:
        with gr.Row(elem_id="top", equal_height=True):
            gr.HTML("<h1>Rediffuse studio</h1>", elem_id="title")
            run = gr.Dropdown([], label="run", elem_id="run", scale=3, min_width=280)
            again = gr.Button("look again", elem_id="again", size="md", scale=0, min_width=120)
        line = gr.HTML(elem_id="line")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                panels = [*_generate(desk, run)]
            with gr.Tab("Start from an image", id="edit", elem_id="edit"):
                panels += _edit(desk, run)
            with gr.Tab("Compare", id="compare"):
                second, of_both = _compare(desk, run)
                panels += of_both
            with gr.Tab("Training", id="training"):
                _training(desk, run, tabs)
        looks = [page.load, again.click]
        _follow(desk, Chosen(run, second, line), looks, panels)

        def leave(request: gr.Request) -> None:
            desk.leave(str(request.session_hash))

        page.unload(leave)
    return page


# Fields


def _newest(choices: Sequence[shelf.Choice]) -> str | None:
    return choices[0][1] if choices else None


def _panel(name: str) -> Panel:
    """Empty fields; `_own` fills them from a run."""
    with gr.Group(elem_id=f"{name}-panel"):
        checkpoint = gr.Dropdown([], label="checkpoint", elem_id=f"{name}-checkpoint")
        with gr.Row():
            solver = gr.Dropdown(
                names("solver"),
                label="solver",
                allow_custom_value=True,  # heun churn=40
                min_width=150,
                elem_id=f"{name}-solver",
            )
            weights = gr.Dropdown(
                ["average", "raw"],
                value="average",
                label="weights",
                min_width=120,
                elem_id=f"{name}-weights",
            )
        with gr.Row():
            steps = gr.Number(label="steps", precision=0, min_width=75, elem_id=f"{name}-steps")
            guidance = gr.Number(
                label="guidance", step=0.5, min_width=75, elem_id=f"{name}-guidance"
            )
            class_name = gr.Dropdown([], label="class", min_width=110, elem_id=f"{name}-class")
    return Panel(checkpoint, weights, solver, steps, guidance, class_name)


def _seeds(name: str, value: str) -> Seeds:
    with gr.Row():
        seeds = gr.Textbox(
            value,
            label="seeds",
            info="which: 0-15, or 3,5,8",
            max_lines=1,
            scale=2,
            min_width=140,
            elem_id=f"{name}-seeds",
        )
        seed = gr.Number(
            0,
            label="seed",
            info="another set",
            precision=0,
            scale=1,
            min_width=90,
            elem_id=f"{name}-seed",
        )
    return Seeds(seeds, seed)


def _actions(desk: Desk, name: str, label: str) -> tuple[gr.Button, gr.Radio]:
    """A bar to start, to stop, and to choose what is seen meanwhile."""
    with gr.Row(elem_classes="actions", equal_height=True):
        go = gr.Button(label, variant="primary", elem_id=f"{name}-go", scale=1, min_width=120)
        cancel = gr.Button(
            "Cancel", variant="stop", elem_id=f"{name}-cancel", scale=1, min_width=90
        )
        shown = gr.Radio(
            [("x_t, where the solver is", "x_t"), ("x̂_0, what the model sees", "x_0")],
            value="x_t",
            show_label=False,
            container=False,
            scale=3,
            min_width=300,
            elem_id=f"{name}-shown",
        )

    def stop(request: gr.Request) -> None:
        desk.stop(str(request.session_hash))

    cancel.click(stop, **_AT_ONCE)
    return go, shown


def _own(card: shelf.Card | None, nobody: str) -> list[Any]:
    """What a panel says for a run: as the run samples by itself."""
    if card is None:
        empty = gr.Dropdown(choices=[], value=None)
        return [empty, "average", None, None, None, empty]
    own = card.config.sampling
    solvers = names("solver")
    return [
        gr.Dropdown(choices=card.checkpoints, value=_newest(card.checkpoints)),
        "average" if card.config.average.half_life_images else "raw",
        gr.Dropdown(
            choices=list(dict.fromkeys([own.solver.name, *solvers])), value=own.solver.name
        ),
        own.steps,
        own.guidance.arguments.get("scale", 1),
        gr.Dropdown(choices=[(nobody, ""), *((n, n) for n in card.class_names)], value=""),
    ]


def _follow(
    desk: Desk, chosen: Chosen, looks: Sequence[Any], panels: Sequence[tuple[Panel, str]]
) -> None:
    """Fill every panel anew when another run is chosen, and look for runs when asked to."""
    parts = [part for panel, _ in panels for part in panel]

    def fill(word: str | None) -> list[Any]:
        card, said = _card(desk, word)
        return ["", said, *(value for _, nobody in panels for value in _own(card, nobody))]

    def look(word: str | None) -> list[Any]:
        choices = shelf.run_choices(desk.root)
        known = word if word in [value for _, value in choices] else _newest(choices)
        _, *filled = fill(known)
        others = gr.Dropdown(choices=[_THE_SAME, *choices], value="")
        return [gr.Dropdown(choices=choices, value=known), others, *filled]

    run, second, line = chosen
    run.input(fill, run, [second, line, *parts], **_NEVER_CALLED_FROM_OUTSIDE)
    gr.on(looks, look, run, [run, second, line, *parts], **_NEVER_CALLED_FROM_OUTSIDE)


def _card(desk: Desk, word: str | None) -> tuple[shelf.Card | None, str]:
    """What a run says of itself, and a line about it."""
    if not word:
        return None, showing.runs(shelf.run_choices(desk.root), desk.root)
    try:
        card = shelf.card(desk.root, word)
    except RediffuseError as refused:
        return None, showing.refusal(refused)
    return card, showing.about(card)


# Tabs


def _generate(desk: Desk, run: gr.Dropdown) -> list[tuple[Panel, str]]:
    with gr.Row():
        with gr.Column(scale=2, min_width=290):
            panel, seeds = _panel("generate"), _seeds("generate", "0-19")
        with gr.Column(scale=5, min_width=300):
            go, shown = _actions(desk, "generate", "Generate")
            line = gr.HTML(elem_id="generate-line")
            images = gr.HTML(showing.empty("Generate"), elem_id="generate-images")

    def draw(values: Values, request: gr.Request) -> Iterator[list[Any]]:
        asked = panel.asked(values, values[run], **seeds.said(values))
        yield from _sheets(
            acts.draw(desk, str(request.session_hash), [asked], values[shown]), sides=1
        )

    go.click(draw, {run, *panel, *seeds, shown}, [line, images], **_DRAWS)
    return [(panel, "all")]


def _edit(desk: Desk, run: gr.Dropdown) -> list[tuple[Panel, str]]:
    square = gr.State()
    with gr.Row():
        with gr.Column(scale=2, min_width=290):
            with gr.Row():
                file = gr.UploadButton(
                    "Upload an image",
                    file_types=list(SUFFIXES),
                    size="md",
                    min_width=120,
                    elem_id="edit-file",
                )
                start = gr.Button("Draw one", size="md", min_width=90, elem_id="edit-start")
            way = gr.Radio(
                ["variation", "inpainting"], value="variation", label="make a", elem_id="edit-way"
            )
            strength = gr.Slider(
                0, 1, 0.6, label="strength", info="how much is made new", elem_id="edit-strength"
            )
            resamplings = gr.Number(
                1,
                label="resamplings",
                info="more fit better to what is given, and take as much longer (RePaint)",
                precision=0,
                visible=False,
                elem_id="edit-resamplings",
            )
            panel, seeds = _panel("edit"), _seeds("edit", "0-3")
        with gr.Column(scale=5, min_width=300):
            canvas = gr.ImageEditor(
                label="given; draw over what is to be painted anew",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(colors=[_MASK], color_mode="fixed", default_size=40),
                eraser=gr.Eraser(default_size=40),
                buttons=[],
                canvas_size=(448, 448),
                height=520,
                elem_id="edit-canvas",
            )
            go, shown = _actions(desk, "edit", "Generate")
            line = gr.HTML(elem_id="edit-line")
            images = gr.HTML(showing.empty("Generate"), elem_id="edit-images")

    def take(path: str | None, word: str | None) -> list[Any]:
        if path is None:
            return [None, None, ""]
        try:
            return [*_on_canvas(acts.take(desk, Asked(run=word), Path(path))), ""]
        except RediffuseError as refused:
            return [None, None, showing.refusal(refused)]

    def draw_one(values: Values, request: gr.Request) -> list[Any]:
        asked = panel.asked(values, values[run], **seeds.said(values))
        drawn = acts.first(desk, str(request.session_hash), asked)
        if isinstance(drawn, str):
            return [gr.skip(), gr.skip(), drawn]
        return [*_on_canvas(drawn), ""]

    def draw(values: Values, request: gr.Request) -> Iterator[list[Any]]:
        asked = panel.asked(values, values[run], **seeds.said(values))
        if values[square] is None:
            yield [showing.line("give an image first, or draw one to start from", "bad"), gr.skip()]
            return
        mask = _mask(values[square], values[canvas]) if values[way] == "inpainting" else None
        edit = Edit(values[square], values[strength], mask, values[resamplings])
        session = str(request.session_hash)
        yield from _sheets(acts.draw(desk, session, [asked], values[shown], edit), sides=1)

    def fields(way: str) -> list[Any]:
        return [gr.Slider(visible=way == "variation"), gr.Number(visible=way == "inpainting")]

    way.change(fields, way, [strength, resamplings], **_AT_ONCE)
    file.upload(take, [file, run], [square, canvas, line], **_NEVER_CALLED_FROM_OUTSIDE)
    start.click(draw_one, {run, *panel, *seeds}, [square, canvas, line], **_DRAWS)
    told = {run, *panel, *seeds, shown, square, canvas, way, strength, resamplings}
    go.click(draw, told, [line, images], **_DRAWS)
    return [(panel, "none")]


def _on_canvas(given: acts.Given) -> list[Any]:
    return [given.square, {"background": given.canvas, "layers": [], "composite": None}]


def _mask(square: Square, canvas: Any) -> np.ndarray:
    """What was drawn: the opaque part of the layer above the image."""
    size = square.shape[-1]
    layers = (canvas or {}).get("layers") or [np.zeros((size, size, 4), np.uint8)]
    return mask_of(np.max([layer[:, :, 3] for layer in layers], axis=0), size)


def _compare(desk: Desk, run: gr.Dropdown) -> tuple[gr.Dropdown, list[tuple[Panel, str]]]:
    with gr.Row():
        second = gr.Dropdown(
            [_THE_SAME], value="", label="run of B", min_width=290, elem_id="b-run"
        )
        seeds = _seeds("compare", "0-8")
    go, shown = _actions(desk, "compare", "Compare")
    line = gr.HTML(elem_id="compare-line")
    with gr.Row():
        with gr.Column(min_width=290):
            gr.HTML("<h3>A</h3>")
            one, left = _panel("a"), gr.HTML(showing.empty("Compare"), elem_id="a-images")
        with gr.Column(min_width=290):
            gr.HTML("<h3>B</h3>")
            other, right = _panel("b"), gr.HTML(showing.empty("Compare"), elem_id="b-images")

    def draw(values: Values, request: gr.Request) -> Iterator[list[Any]]:
        more = seeds.said(values)
        asked = [
            one.asked(values, values[run], **more),
            other.asked(values, values[second] or values[run], **more),
        ]
        session = str(request.session_hash)
        yield from _sheets(acts.draw(desk, session, asked, values[shown]), sides=2)

    def another(word: str, first: str | None) -> list[Any]:
        card, said = _card(desk, word or first)
        return [said if card is None else "", *_own(card, "all")]

    second.input(another, [second, run], [line, *other], **_NEVER_CALLED_FROM_OUTSIDE)
    told = {run, second, *one, *other, *seeds, shown}
    go.click(draw, told, [line, left, right], **_DRAWS)
    return second, [(one, "all"), (other, "all")]


def _training(desk: Desk, run: gr.Dropdown, tabs: gr.Tabs) -> None:
    shown = gr.HTML(elem_id="training-shown")
    mark, timer = gr.State(""), gr.Timer(_LOOK_EVERY_S, active=False)

    def look(word: str | None, seen: str) -> list[Any]:
        if not word:
            return [showing.line("no run"), ""]
        try:
            found = find_run(desk.root, word)
            if (now := shelf.mark(found)) == seen:
                return [gr.skip(), gr.skip()]
            return [showing.training(*shelf.training(found)), now]
        except RediffuseError as refused:
            return [showing.refusal(refused), ""]

    def watch(word: str | None, seen: str, event: gr.SelectData) -> list[Any]:
        is_here = event.value == "Training"
        return [gr.Timer(active=is_here), *(look(word, seen) if is_here else [gr.skip()] * 2)]

    told = {"fn": look, "inputs": [run, mark], "outputs": [shown, mark]}
    timer.tick(**told, **_NEVER_CALLED_FROM_OUTSIDE)
    run.input(**told, **_NEVER_CALLED_FROM_OUTSIDE)
    tabs.select(watch, [run, mark], [timer, shown, mark], **_NEVER_CALLED_FROM_OUTSIDE)


def _sheets(sheets: Iterator[acts.Sheet], sides: int) -> Iterator[list[Any]]:
    """What a sheet does not say stays as it is."""
    for line, blocks in sheets:
        yield [line, *(blocks or [gr.skip()] * sides)]
