"""The package from Python: what the functions take, and from which threads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cli import TINY
from PIL import Image

import rediffuse


def test_a_run_trained_in_a_thread_is_what_load_and_generate_samples_take(tmp_path: Path) -> None:
    words = (*TINY, "training.images=48", "training.previews=false", "device=cpu")
    with ThreadPoolExecutor(1) as pool:  # as a server or a notebook's widget does
        run = pool.submit(rediffuse.train, *words, root=str(tmp_path)).result()
    assert run.read().status == "FINISHED"
    assert rediffuse.load(run).images_seen == 48
    assert rediffuse.load(run.id[:8], root=str(tmp_path)).images_seen == 48
    picture = rediffuse.generate_samples(run, 4, tmp_path / "few.png")
    with Image.open(picture) as opened:
        assert opened.format == "PNG"
