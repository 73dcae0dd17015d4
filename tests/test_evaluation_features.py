"""What feature networks promise: equal features whatever the batch, checked weights, no code."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rediffuse.errors import ConfigError, DataError, RunError
from rediffuse.evaluation import inception as inceptions
from rediffuse.evaluation.classifier import (
    FACTS,
    WEIGHTS,
    Classifier,
    _batch,
    classification_accuracy_score,
    load_classifier,
    save_classifier,
    train_classifier,
)
from rediffuse.evaluation.features import Features
from rediffuse.evaluation.inception import FILE, Inception, find_weights, inception
from rediffuse.evaluation.local import local_features
from rediffuse.randomness import Stream, normal, words


def bars(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy 8x8 images of a bar: upright or lying, in one of two places; four classes."""
    index = torch.arange(count)
    labels = words(seed, Stream.EVALUATION, index, 1)[:, 0] % 4
    x = 100 + 25 * normal(seed, Stream.EVALUATION, index, (1, 8, 8), draw=1)
    for picture, label in zip(x, labels.tolist(), strict=True):
        place = 2 if label < 2 else 5
        picture[0, place] += 100 * (label % 2)
        picture[0, :, place] += 100 * (1 - label % 2)
    return x.clamp(0, 255).to(torch.uint8).numpy(), labels.numpy()


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return train_classifier(*bars(400), 4, 0, images_seen=2000)


def pictures(count: int, channels: int = 1, size: int = 8) -> Tensor:
    drawn = words(3, Stream.EVALUATION, torch.arange(count), channels * size * size) % 256
    return drawn.to(torch.uint8).reshape(count, channels, size, size)


def holds_what_features_promise(look: Features, pixels: Tensor) -> None:
    """One image at a time, all at once and backwards: the same, up to rounding."""
    whole, alone = look(pixels), [look(pixels[k : k + 1]) for k in range(len(pixels))]
    backwards = look(pixels.flip(0))
    for one, parts, other in zip(whole, zip(*alone, strict=True), backwards, strict=True):
        if one is None:
            continue
        assert one.dtype == torch.float32
        assert one.device.type == "cpu"
        scale = float(one.abs().max())
        torch.testing.assert_close(torch.cat(parts), one, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(other.flip(0), one, rtol=0, atol=1e-5 * scale)
    assert json.loads(json.dumps(dict(look.facts))) == look.facts
    assert len(look.digest) == 16


def test_a_classifier_learns_what_is_there_to_be_learnt(trained):
    x, y = bars(200, seed=1)
    assert trained.name == "classifier"
    assert trained.accuracy >= 0.97
    seen = trained(torch.from_numpy(x))
    assert seen.logits is not None
    assert (seen.logits.argmax(1).numpy() == y).mean() >= 0.97
    assert seen.features.shape == (200, 96)


def test_a_classifier_sees_the_same_whatever_the_batch(trained):
    holds_what_features_promise(trained, torch.from_numpy(bars(9)[0]))


def test_equal_arguments_train_equal_weights_and_leave_torchs_generator_alone(trained):
    before = torch.get_rng_state()
    again = train_classifier(*bars(400), 4, 0, images_seen=128)
    assert again.digest == train_classifier(*bars(400), 4, 0, images_seen=128).digest
    assert again.digest != train_classifier(*bars(400), 4, 1, images_seen=128).digest
    assert torch.get_rng_state().equal(before)


def test_each_epoch_shows_every_image_once_in_a_new_order():
    images, labels = np.zeros((40, 1, 8, 8), np.uint8), np.arange(40)
    shown = [_batch(images, labels, labels, 0, seen, 40)[1] for seen in (0, 40)]
    for order in shown:
        assert order.sort().values.equal(torch.arange(40))
    assert not shown[0].equal(shown[1])


def test_a_saved_classifier_is_loaded_equal(trained, tmp_path):
    save_classifier(trained, tmp_path)
    loaded = load_classifier(tmp_path)
    assert (loaded.name, loaded.digest, loaded.facts) == (
        trained.name,
        trained.digest,
        trained.facts,
    )
    x = torch.from_numpy(bars(5)[0])
    assert loaded(x).features.equal(trained(x).features)
    assert sorted(file.name for file in tmp_path.iterdir()) == [FACTS, WEIGHTS]


def test_a_damaged_classifier_is_refused(trained, tmp_path):
    with pytest.raises(RunError, match="no usable classifier"):
        load_classifier(tmp_path)
    save_classifier(trained, tmp_path)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(RunError, match="is not what"):
        load_classifier(tmp_path)
    (tmp_path / FACTS).write_text("[]")
    with pytest.raises(RunError, match="not a JSON object"):
        load_classifier(tmp_path)


def test_without_labels_a_classifier_learns_quarter_turns():
    x, y = bars(400)
    found = train_classifier(x[y == 0], None, 0, 0, images_seen=1500)
    assert found.name == "turns"
    assert found.facts["classes"] == 4
    assert found.accuracy >= 0.97


def test_classification_accuracy_score_falls_with_the_samples_labels():
    samples, asked = bars(300, seed=2)
    real = bars(200, seed=3)
    right = classification_accuracy_score(samples, asked, *real, 4, 0, images_seen=1500)
    wrong = classification_accuracy_score(samples, (asked + 1) % 4, *real, 4, 0, images_seen=1500)
    assert right >= 0.95
    assert wrong <= 0.05


@pytest.mark.parametrize(
    ("labels", "classes", "match"),
    [
        (np.zeros(30, np.int64), 10, "do not fit"),
        (np.full(40, 10), 10, "0 .. 9"),
        (np.full(40, -1), 10, "0 .. 9"),
        (np.zeros(40, np.int64), 1, "two classes"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, classes, match):
    with pytest.raises(DataError, match=match):
        train_classifier(bars(40)[0], labels, classes, 0)


def test_images_that_do_not_fit_are_refused(trained):
    with pytest.raises(DataError, match="cannot learn from 5"):
        train_classifier(*bars(5), 4, 0)
    with pytest.raises(DataError, match="square"):
        train_classifier(bars(40)[0][:, :, :6], None, 0, 0)
    with pytest.raises(DataError, match=r"\(1, 8, 8\)"):
        trained(pictures(2, size=9))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[Path, str]:
    """A file of random weights in the place of the real ones, and its digest."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as V3

    file = tmp_path_factory.mktemp("weights") / FILE
    empty = file.with_name("empty")
    torch.save({}, empty)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(V3, "load_state_dict", lambda self, state: None)
        state = V3("x", ["2048"], feature_extractor_weights_path=str(empty)).state_dict()
    # He et al. 2015, so that something arrives at the end
    state = {k: 6**0.5 * v if k.endswith("conv.weight") else v for k, v in state.items()}
    torch.save(state, file)
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def look(weights) -> Inception:
    file, sha256 = weights
    return inception(file, sha256=sha256)


def test_inception_is_torch_fidelitys(look, weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as V3

    layers = ["768", "2048", "logits_unbiased"]
    reference = V3("x", layers, feature_extractor_weights_path=str(weights[0]))
    x = pictures(2, 3, 16)
    _, features, logits = reference(x)
    seen = look(x)
    torch.testing.assert_close(seen.features, features)
    torch.testing.assert_close(seen.logits, logits)
    inputs = []
    hook = reference.Mixed_6d.branch1x1.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    reference(x)
    hook.remove()
    expected = reference.Mixed_6d.branch1x1(inputs[0])[:, :7]
    assert expected.shape == (2, 7, 17, 17)
    torch.testing.assert_close(seen.spatial, expected.flatten(1))
    assert look.name == "inception"


def test_inception_sees_the_same_whatever_the_batch(look):
    holds_what_features_promise(look, pictures(3, 3, 12))


def test_grey_images_are_repeated_and_others_refused(look):
    grey = pictures(2, 1, 8)
    torch.testing.assert_close(look(grey).features, look(grey.repeat(1, 3, 1, 1)).features)
    with pytest.raises(DataError, match="not 4"):
        look(pictures(2, 4, 8))


@pytest.fixture
def server(weights) -> Iterator[str]:
    """The file of weights at an address of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given) -> None:
            super().__init__(*given, directory=weights[0].parent)

        def log_message(self, *_) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}/{FILE}"
        serving.shutdown()


def test_weights_are_downloaded_once_and_whole(server, weights, tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    file = find_weights(folder, address=server, sha256=weights[1])
    assert file.read_bytes() == weights[0].read_bytes()
    assert list(folder.iterdir()) == [file]
    monkeypatch.setattr(inceptions, "_download", None)  # it would fail if it were called
    assert find_weights(folder, address=server, sha256=weights[1]) == file


def test_a_wrong_download_leaves_nothing(server, tmp_path):
    with pytest.raises(ConfigError, match="not 6726825d") as refused:
        find_weights(tmp_path, address=server)
    assert str(tmp_path / FILE) in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_error_says_which_file_goes_where(tmp_path):
    for given in ({"download": False}, {"address": "http://127.0.0.1:9/none"}):
        with pytest.raises(ConfigError) as refused:
            find_weights(tmp_path, **given)
        assert FILE in str(refused.value)
        assert str(tmp_path / FILE) in str(refused.value)
        assert "\n" not in str(refused.value)


def test_other_weights_are_refused_before_anything_is_made_of_them(weights, tmp_path):
    with pytest.raises(ConfigError, match="SHA-256"):
        inception(weights[0])
    with pytest.raises(ConfigError, match="cannot be read"):
        inception(tmp_path / "none.pth")


def saved_model(folder: Path, kind: str) -> Path:
    """A tiny random model of `transformers`, as a download would lie there."""
    import transformers

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**size, "image_size": 28, "patch_size": 14}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "dinov2":
            model = transformers.Dinov2Model(transformers.Dinov2Config(**vision))
        else:
            text = {**size, "vocab_size": 10, "intermediate_size": 16}
            config = transformers.CLIPConfig(
                text_config=text, vision_config={**vision, "intermediate_size": 16}
            )
            model = transformers.CLIPModel(config)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor" if kind == "dinov2" else "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 28, "width": 28},
        "do_center_crop": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_a_local_model_is_transformers_own(kind, tmp_path):
    import transformers

    folder = saved_model(tmp_path / f"{kind}-tiny", kind)
    look = local_features(folder)
    assert look.name == f"{kind}_tiny"
    x = pictures(3, 3, 28)  # which needs no resizing
    holds_what_features_promise(look, x)
    mean, sd = (torch.tensor(v)[:, None, None] for v in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    ranged = (x.float() / 255 - mean) / sd
    with torch.no_grad():
        expected = (
            model(ranged).last_hidden_state[:, 0]
            if kind == "dinov2"
            else model.get_image_features(ranged).pooler_output
        )
    torch.testing.assert_close(look(x).features, expected)


def test_a_local_models_digest_is_that_of_its_files(tmp_path):
    folder = saved_model(tmp_path / "dinov2", "dinov2")
    before = local_features(folder).digest
    assert local_features(folder).digest == before
    file = folder / "preprocessor_config.json"
    file.write_text(file.read_text().replace("0.4", "0.45"))
    assert local_features(folder).digest != before


def test_a_local_model_without_all_of_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved_model(tmp_path / "dinov2", "dinov2")
    kept = load_file(folder / "model.safetensors")
    del kept["embeddings.cls_token"]
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="lack 1 of its weights"):
        local_features(folder)


def test_what_is_no_local_model_is_refused_in_one_line(tmp_path):
    for content in (
        None,
        "{}",
        "not json",
        '{"model_type": "mine", "auto_map": {"AutoModel": "x.X"}}',
    ):
        if content is not None:
            for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
                (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError) as refused:
            local_features(tmp_path)
        assert "\n" not in str(refused.value)
        assert str(tmp_path) in str(refused.value)
