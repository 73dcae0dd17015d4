"""Rediffuse beside its peers on this machine: `python -m benchmarks.compare --help`.

Every way to do one piece of work is built in a process of its own, warmed up and then timed in
turns. Printed are medians, and ratios of FLOP/s to the best of diffusers and
denoising-diffusion-pytorch. Needs torch, numpy, einops and jaxtyping; a peer that is not installed
is left out and named.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ours, peers
from benchmarks.measure import Times, Way, alternate, facts
from benchmarks.peak import peaks
from benchmarks.sizes import SIZES, Size
from rediffuse.training.devices import PRECISIONS

Row = dict[str, Any]


def main() -> None:
    """Measure what is asked for, print a table, and write it down."""
    asked = _arguments()
    device = torch.device(asked.device)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    command = " ".join(sys.argv[1:])
    if asked.out:  # where it lies is nobody's concern
        command = command.replace(str(asked.out), "FILE")
    told: dict[str, Any] = {"facts": facts(device), "command": command, "rows": []}
    for precision in asked.precision:
        peak = peaks(device, PRECISIONS[precision])
        told.setdefault("peaks", {})[precision] = peak
        rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in peak.items())
        print(f"{precision}: {rates}")
        for work in asked.work:
            for name in asked.size:
                size = SIZES[name]
                if asked.batch:
                    size = replace(size, batch_size=asked.batch)
                rows = measured(work, size, precision, device, asked.rounds, peak["conv"])
                told["rows"] += rows
                print(markdown(rows), flush=True)
    if asked.out:
        asked.out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
        asked.out.with_suffix(".md").write_text(_page(told))


def measured(
    work: str, size: Size, precision: str, device: torch.device, rounds: int, peak: float
) -> list[Row]:
    """A row for each way: images a second, GFLOP/s, share of the peak, ratio to the best peer."""
    flops = counted_flops(work, size)
    taken, failed = alternate(_ways(work, size, precision, device), device, rounds)
    for name, why in failed.items():
        print(f"  {name}: left out ({why})")
    per_image = {name: flops["lucidrains" if "lucid" in name else "unet"] for name in taken}
    speed = {name: per_image[name] / times.median for name, times in taken.items()}
    best = max((s for name, s in speed.items() if name.startswith(_PEERS)), default=None)
    return [
        _row(work, size, precision, name, times, per_image[name], peak, best)
        for name, times in taken.items()
    ]


_PEERS = ("diffusers", "lucidrains")


def _row(
    work: str,
    size: Size,
    precision: str,
    name: str,
    times: Times,
    flops_per_image: float,
    peak: float,
    best: float | None,
) -> Row:
    per_s = size.batch_size / times.median
    return {
        "work": work,
        "size": size.name,
        "precision": precision,
        "batch": size.batch_size,
        "way": name,
        "images_per_s": per_s,
        "spread": times.spread,
        "gflop_per_image": flops_per_image / 1e9,
        "gflop_per_s": per_s * flops_per_image / 1e9,
        "share_of_conv_peak": per_s * flops_per_image / peak,
        "times_best_peer": flops_per_image / times.median / best if best else None,
        "seconds": times.seconds,
    }


def counted_flops(work: str, size: Size) -> dict[str, float]:
    """FLOPs of one image in our U-Net and in denoising-diffusion-pytorch's; training is 3 x."""
    found = {"unet": _forward_flops(size.ours(), size)}
    try:
        found["lucidrains"] = _forward_flops(peers.lucidrains_network(size), size)
    except ImportError:
        found["lucidrains"] = found["unet"]
    return {name: flops * (3 if work == "train" else 1) for name, flops in found.items()}


def _forward_flops(network: torch.nn.Module, size: Size) -> float:
    x = torch.zeros(1, size.channels, size.image_size, size.image_size)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(x, torch.ones(1))
    return float(counter.get_total_flops())


def _ways(work: str, size: Size, precision: str, device: torch.device) -> Mapping[str, Way]:
    given = size, precision, device
    ours_too = {"train": ours.train, "evaluate": ours.evaluate}[work]
    bare = {"train": peers.plain_train, "evaluate": peers.bare_evaluate}[work]
    theirs = {"train": peers.diffusers_train, "evaluate": peers.diffusers_evaluate}[work]
    compiled = {"compiled": True}
    ways = {
        "rediffuse": Way(ours_too, given),
        "rediffuse, compiled": Way(ours_too, given, compiled),
        "our network, plain loop" if work == "train" else "our network alone": Way(bare, given),
        "diffusers": Way(theirs, given),
        "diffusers, compiled": Way(theirs, given, compiled),
    }
    if device.type != "cpu":  # where `exact` is what is taken anyway
        ways["rediffuse, compiled, exact"] = Way(
            ours_too, given, {**compiled, "determinism": "exact"}
        )
    if work == "train":
        return {**ways, "lucidrains": Way(peers.lucidrains_train, given)}
    return {**ways, "our network alone, compiled": Way(bare, given, compiled)}


def markdown(rows: list[Row]) -> str:
    """A table that can be read in a terminal and on a page."""
    head = "| work | precision | way | img/s | ± | GFLOP/s | of conv peak | x best peer |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        ratio = row["times_best_peer"]
        lines.append(
            f"| {row['work']} {row['size']}, batch {row['batch']} | {row['precision']} "
            f"| {row['way']} | {row['images_per_s']:.1f} | {row['spread']:.0%} "
            f"| {row['gflop_per_s']:.0f} | {row['share_of_conv_peak']:.0%} "
            f"| {'-' if ratio is None else f'{ratio:.2f}'} |"
        )
    return "\n".join(lines)


def _page(told: Mapping[str, Any]) -> str:
    known = ", ".join(f"{name} {value}" for name, value in told["facts"].items() if value)
    peak = "; ".join(
        f"{precision}: matmul {rates['matmul'] / 1e9:,.0f}, convolution {rates['conv'] / 1e9:,.0f}"
        for precision, rates in told["peaks"].items()
    )
    return (
        f"# Beside the peers\n\n{known}\n\n`python -m benchmarks.compare {told['command']}`\n\n"
        f"Measured peaks in GFLOP/s, {peak}.\n\n{markdown(told['rows'])}\n"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument(
        "--work", nargs="+", default=["train", "evaluate"], choices=["train", "evaluate"]
    )
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument(
        "--precision", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; else torch's choice")
    parser.add_argument("--batch", type=int, help="images of a step; else 128 and 16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write FILE.json and FILE.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
