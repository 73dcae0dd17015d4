"""What share of training time looking on takes: `python -m benchmarks.looking_on`.

That is previews, metrics and trackers. A short piece of a preset is trained as `rediffuse train`
does, with every call timed; then the parts are added up as often as the whole preset has them. What
the main thread does counts by the wall clock, what background threads do by their CPU time, as if
training had waited for it.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.measure import watch
from rediffuse import launch
from rediffuse.config.compose import compose
from rediffuse.lengths import planned_images
from rediffuse.session import Session
from rediffuse.tracking.journal import Journal
from rediffuse.tracking.mlflow import Mlflow
from rediffuse.tracking.resources import Resources
from rediffuse.tracking.tensorboard import TensorBoard
from rediffuse.training import loop


def main() -> None:
    """Train a piece, and say what share of the whole looking on is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.looking_on", description=__doc__)
    parser.add_argument("words", nargs="*", default=["experiment=mnist"], help="as for train")
    parser.add_argument("--trackers", default="mlflow,tensorboard")
    parser.add_argument("--images", type=int, default=12_800, help="the piece that is trained")
    parser.add_argument("--previews", type=int, default=2, help="in the piece")
    asked = parser.parse_args()
    words = [*asked.words, f"tracking.trackers=[{asked.trackers}]"]
    piece = [
        *("training.epochs=null", f"training.images={asked.images}"),
        f"training.preview_every_images={asked.images // asked.previews}",
        f"training.log_every_images={asked.images // 4}",
    ]
    steps = watch(loop, "train_step", time.perf_counter)
    previews = watch(Session, "preview", time.perf_counter)
    writing = [
        watch(owner, name, time.perf_counter)
        for owner, name in ((Journal, "metrics"), (Resources, "__call__"))
    ]
    given = {
        name: [watch(tracker, name, time.thread_time) for tracker in (Mlflow, TensorBoard)]
        for name in ("open", "metrics", "artifact", "close")
    }
    whole = compose(words)
    with tempfile.TemporaryDirectory() as root:
        launch.train(compose([*words, *piece]), root=Path(root))
        (environment,) = Path(root).glob("*/environment.json")
        epoch = json.loads(environment.read_bytes())["data"]["train_images"]
    planned, size = planned_images(whole, epoch), whole.training.batch_size
    drawn = planned // (whole.training.preview_every_images or max(epoch, planned // 20))
    written = planned // (whole.training.log_every_images or min(50 * size, epoch))
    training = planned / size * statistics.median(steps)
    rows, sent = len(writing[1]), {name: sum(map(sum, taken)) for name, taken in given.items()}
    pictures = [seconds for seconds in previews if seconds > 1e-3]  # others were drawn already
    parts = {
        f"{drawn} previews": drawn * statistics.median(pictures),
        f"{written} rows": written * sum(map(sum, writing)) / rows,
        "background: rows": written * sent["metrics"] / rows,
        "background: files": drawn * sent["artifact"] / len(pictures),
        "background: begin and end": sent["open"] + sent["close"],
    }
    print(f"training  {training:10.1f} s, {planned:,} images at {planned / training:.1f} a second")
    for name, seconds in parts.items():
        print(f"{name:<26} {seconds:8.2f} s  {seconds / training:7.3%}")
    print(f"{'together':<26} {sum(parts.values()):8.2f} s  {sum(parts.values()) / training:7.3%}")


if __name__ == "__main__":
    main()
