"""Trains kimi-tiny from scratch and publishes it: a folder in the layout of the 595 GB checkpoint.

    python -m examples.train_tiny.train [--out kimi-tiny] [--steps 3600] [--work .train_tiny] [--seed 0]
    python -m examples.train_tiny.train --further --out kimi-tiny --steps 500 --rate 4e-4 --work .train_further

The second goes on from the weights that are published in `--out`. Everything is seeded. The state is saved to `--work`
as it goes; the same command resumes from it, also with other steps.
`losses.csv` there has the loss of each task; `python -m examples.train_tiny.train --plot FILE` draws it.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from kimi.modeling_kimi import Router

from .data import Batches
from .model import build_for_training, export, load_processor, load_published, write_untrained
from .muon import optimizers
from .precision import product_dtype

LEARNING_RATE = 3e-3
WARM_UP = 100  # steps
DECAY = 0.45  # share of the steps, at the end, in which the learning rate falls to 0
BALANCE = 1e-3  # how far a step moves the bias of an expert that gets too much or too little
SAVE_EVERY = 250


def learning_rate(step: int, steps: int, rate: float = LEARNING_RATE) -> float:
    return rate * min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


def balance_experts(model: torch.nn.Module) -> None:
    """Moves the correction biases against the load, without a loss (DeepSeek-V3, arXiv:2412.19437, section 2.1.2)."""

    def hook(router: Router, inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        if router.training:
            bias = router.e_score_correction_bias
            load = outputs[0].flatten().bincount(minlength=len(bias)).float()
            bias.add_(BALANCE * (load.mean() - load).sign())

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(hook)


# -------------------------------------------------------------------------------------------------------------- state


def save_state(model: torch.nn.Module, optims: list, step: int, work: Path) -> None:
    """Parameters, optimizer tensors and the step, complete or not at all."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for index, optim in enumerate(optims):
        for number, state in optim.state_dict()["state"].items():
            tensors.update({f"optim.{index}.{number}.{key}": value for key, value in state.items()})
    save_file({name: t.contiguous() for name, t in tensors.items()}, work / "state.part", {"step": str(step)})
    (work / "state.part").replace(work / "state.safetensors")


def load_state(model: torch.nn.Module, optims: list, work: Path) -> int:
    """Fills model and optimizers; returns the number of steps done, 0 if there is no state."""
    path = work / "state.safetensors"
    if not path.is_file():
        return 0
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"model.{name}"])
    for index, optim in enumerate(optims):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            kind, number, *rest = name.split(".")
            if kind == "optim" and int(number) == index:
                state.setdefault(int(rest[0]), {})[rest[1]] = tensor
        optim.load_state_dict({"state": state, "param_groups": optim.state_dict()["param_groups"]})
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["step"])


# ----------------------------------------------------------------------------------------------------------- training


def train_step(model: torch.nn.Module, optims: list, batch: dict[str, Any], rate: float) -> float:
    """One update; the mean loss of the tokens that the assistant says."""
    for optim in optims:
        for group in optim.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
    dtype = product_dtype()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optim in optims:
        optim.step()
        optim.zero_grad(set_to_none=True)
    return float(loss.detach())


def train(
    folder: Path,
    work: Path,
    steps: int,
    tokens: int = 4096,
    seed: int = 0,
    rate: float = LEARNING_RATE,
    further: bool = False,
) -> Iterator[tuple[int, float]]:
    """Trains up to `steps` steps and yields (step, loss) of each; saves the state, and the published folder at the end.

    Begins with the state in `work`; without one with the weights in `folder` if `further`, else from scratch.
    """
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    if not further and not (folder / "config.json").is_file():
        write_untrained(folder)
    model = build_for_training(folder).train()
    if further:
        load_published(model, folder)
    balance_experts(model)
    optims = optimizers(model, rate)
    done = load_state(model, optims, work)
    # A resumed run goes on with samples of its own.
    batches = iter(DataLoader(Batches(load_processor(folder), tokens, seed + done), batch_size=None))
    for step in range(done, steps):
        loss = train_step(model, optims, next(batches), learning_rate(step, steps, rate))
        yield step, loss
        if (step + 1) % SAVE_EVERY == 0:
            save_state(model, optims, step + 1, work)
            export(model, folder)
    save_state(model, optims, steps, work)
    export(model, folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("kimi-tiny"), help="the published folder")
    parser.add_argument("--work", type=Path, default=Path(".train_tiny"), help="state and losses")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=LEARNING_RATE, help="the highest learning rate")
    parser.add_argument("--further", action="store_true", help="begins with the weights that --out has")
    parser.add_argument("--plot", type=Path, help="draws the losses to this file and does nothing else")
    options = parser.parse_args(arguments)
    if options.plot:
        return plot_losses(options.work / "losses.csv", options.plot)
    options.work.mkdir(parents=True, exist_ok=True)
    smooth = None
    with (
        (options.work / "losses.csv").open("a", newline="", encoding="utf-8") as file,
        tqdm(total=options.steps, unit="step", disable=not sys.stderr.isatty()) as bar,
    ):
        writer = csv.writer(file)
        for step, loss in train(
            options.out,
            options.work,
            options.steps,
            options.tokens,
            options.seed,
            options.rate,
            options.further,
        ):
            smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            writer.writerow((step, f"{loss:.5f}"))
            file.flush()
            bar.update(step + 1 - bar.n)
            bar.set_postfix(loss=f"{smooth:.3f}")
    print(
        f"{options.out} is trained; `python -m examples.train_tiny.evaluate {options.out}` asks it held-out questions."
    )


def plot_losses(losses: Path, picture: Path) -> None:
    """Needs matplotlib."""
    import matplotlib.pyplot as plt

    with losses.open(encoding="utf-8") as file:
        steps, values = zip(*((int(step), float(loss)) for step, loss in csv.reader(file)), strict=True)
    smooth, mean = [], values[0]
    for value in values:
        mean = 0.98 * mean + 0.02 * value
        smooth.append(mean)
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot(steps, values, color="#bbccee", linewidth=0.5, label="batch")
    axes.plot(steps, smooth, color="#2244aa", label="smoothed")
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log", title="kimi-tiny")
    axes.legend()
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main()
