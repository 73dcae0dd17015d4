"""How long a run is, and the horizon over which its learning rate falls."""

from pathlib import Path

import pytest

from rediffuse.config.compose import changes, checked, compose, dump_yaml, read_yaml, set_values
from rediffuse.config.schema import Config
from rediffuse.errors import ConfigError
from rediffuse.lengths import check_rate, longer, planned_images, with_horizon

EPOCH = 100


def begun(*words: str) -> Config:
    """The configuration of a run of 10 epochs, as it is written when the run begins."""
    return with_horizon(compose(["training.epochs=10", "rate.warmup_images=0", *words]), EPOCH)


def resumed(old: Config, **values: object) -> Config:
    """The configuration of a run that is resumed with other values."""
    tree = old.model_dump()
    set_values(tree, [(key.replace("__", "."), value) for key, value in values.items()])
    return with_horizon(checked(tree), EPOCH, before=old)


def without_the_fact(config: Config) -> Config:
    """The same configuration, as runs recorded it that did not say where a horizon came from."""
    tree = config.model_dump()
    del tree["rate"]["horizon_follows_plan"]
    return checked(tree)


@pytest.mark.parametrize("recorded", [lambda config: config, without_the_fact])
def test_a_horizon_that_came_from_the_plan_grows_with_it(recorded) -> None:
    old = recorded(begun("rate=cosine"))
    assert old.rate.horizon_images == 1000
    new = resumed(old, training__epochs=20)
    assert new.rate.horizon_images == 2000
    assert changes(old, new) == {"rate.horizon_images": (1000, 2000)}
    assert resumed(new, training__images=5000).rate.horizon_images == 5000
    assert resumed(new, training__epochs=5).rate.horizon_images == 2000
    assert changes(old, resumed(old, training__stop_after_images=10)) == {}


@pytest.mark.parametrize("recorded", [lambda config: config, without_the_fact])
def test_a_typed_horizon_stays(recorded) -> None:
    old = recorded(begun("rate=cosine", "rate.horizon_images=700"))
    assert resumed(old, training__epochs=20).rate.horizon_images == 700
    as_typed = begun("rate=cosine", "rate.horizon_images=1000")
    assert resumed(as_typed, training__epochs=20).rate.horizon_images == 1000
    typed = resumed(begun("rate=cosine"), training__epochs=20, rate__horizon_images=1500)
    assert typed.rate.horizon_images == 1500
    assert resumed(typed, training__epochs=30).rate.horizon_images == 1500
    assert resumed(typed, rate__horizon_images=None).rate.horizon_images == 2000
    follows = resumed(typed, training__epochs=30, rate__horizon_follows_plan=True)
    assert follows.rate.horizon_images == 3000


def test_a_rate_that_does_not_fall_has_no_horizon_to_declare_anew() -> None:
    old = begun("rate=constant")
    new = resumed(old, training__epochs=20)
    assert changes(old, new) == {}
    assert resumed(new, rate__name="cosine").rate.horizon_images == 2000


def test_a_new_run_from_the_file_of_another_has_the_horizon_of_its_own_plan(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(begun("rate=cosine")))
    assert read_yaml(file)["rate"]["horizon_images"] == 1000
    again = with_horizon(compose(["training.epochs=30"], file), EPOCH)
    assert again.rate.horizon_images == 3000
    typed = with_horizon(compose(["training.epochs=30", "horizon_images=500"], file), EPOCH)
    assert typed.rate.horizon_images == 500


def checked_rate(config: Config, images_seen: int, *, refuse: bool = True) -> list[str]:
    said: list[str] = []
    planned = planned_images(config, EPOCH)
    check_rate(config, images_seen, planned, said.append, refuse=refuse)
    return said


@pytest.mark.parametrize("rate", ["cosine", "linear"])
def test_a_length_in_which_the_rate_is_0_is_refused_and_a_part_of_it_is_told(rate: str) -> None:
    size = "training.batch_size=10"
    assert checked_rate(begun(f"rate={rate}", size), 0) == []
    old = begun(f"rate={rate}", size, "rate.horizon_images=400")
    zero = "the learning rate is 0 from {} to 1,000 images " + f"(rate={rate}, "
    # The step that ends at the horizon has a rate of 0 already.
    assert checked_rate(old, 0) == [zero.format(390) + "rate.horizon_images=400)"]
    assert checked_rate(old, 400, refuse=False) == [zero.format(400) + "rate.horizon_images=400)"]
    assert checked_rate(old, 990) == []  # the last step of a straight run has a rate of 0, too
    with pytest.raises(ConfigError, match=r"change no weight; set rate\.horizon_images=1000$"):
        checked_rate(old, 400)
    assert checked_rate(begun(f"rate={rate}", size, "horizon_images=400", "final=0.1"), 400) == []
    assert checked_rate(begun("rate=constant", size, "rate.horizon_images=400"), 400) == []


def test_the_hint_doubles_a_horizon_only_where_it_was_typed() -> None:
    hint = "rediffuse resume ID training.epochs=20"
    assert longer("ID", begun("rate=cosine")) == hint
    typed = begun("rate=cosine", "rate.horizon_images=1000")
    assert longer("ID", typed) == f"{hint} rate.horizon_images=2000"
    images = resumed(begun("rate=cosine"), training__images=777)
    assert longer("ID", images) == "rediffuse resume ID training.images=1554"
