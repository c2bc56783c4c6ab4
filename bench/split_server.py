"""The server of split learning: samples a second with masks and without, clients it keeps up with, memory it holds.

    python -m bench.split_server              # about three minutes
    python -m bench.split_server --quick

The LeNet-like model of AdaSplit, cut behind its first layer, batches of 32. *Masked replay* is a step of the shared
weights and of one client's mask; the *unmasked step* is the same server without masks. Steps of different kinds take
turns, and the fastest half of each counts, so that other work on the machine touches them alike.

Clients are kept up with while one step of theirs takes as long as the server's steps for all of them. A client's step,
half and head on a loss of its own, is timed in the same process: what comes out is how much slower than this core
devices have to be, where every client uploads every batch (eta 1).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bench.common import finish, in_fresh_process, options, peak_bytes, print_table, settle, within
from bench.turns import Step, take_turns, typical_s
from client_app.objectives.half import make_head
from client_app.objectives.ntxent import nt_xent
from strategies.split.masks import MaskConfig
from strategies.split.replay import Replay, Work
from strategies.split.server import SplitServer
from wire.message import TrainConfig
from wire.training import make_saved_optimizer
from zoo import get_model
from zoo.cut import CutModel, cut_model, smashed_shape

BATCH, IMAGE, CUT = 32, (3, 32, 32), "1"
TRAIN = TrainConfig(optimizer="adam", learning_rate=1e-3, weight_decay=1e-5, batch_size=BATCH)
MASKS = {"none": "none", "soft": "soft", "hard": "hard", "hard, half off": "hard"}
"""What a row is called -> the kind of its masks."""
HALF = "hard, half off"
"""Logits below the threshold: the server puts back what its step moved there."""
TARGET_RATIO = 0.7


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, keep the figures."""
    parsed = options("split_server", __doc__).parse_args(arguments)
    torch.set_num_threads(1)
    width = 0.25 if parsed.quick else 1.0
    num_steps = 6 if parsed.quick else 60
    rows = throughput(width, num_steps, parsed.seed)
    print_table("Server steps, LeNet cut behind its first layer, one thread", rows)
    crowd = keeping_up(width, 50, 2 if parsed.quick else 6, parsed.seed)
    print_table("50 clients with a mask each", [crowd])
    bounds = [2**20, 2**21] if parsed.quick else [2**22, 2**24]
    memory = [in_fresh_process(memory_at, bound, 3, width, parsed.seed) for bound in bounds]
    print_table("Memory while 3 clients upload and the server replays", memory)
    return finish("split_server", parsed, {"rows": rows, "crowd": crowd, "memory": memory})


def lenet(width: float, seed: int) -> tuple[CutModel, dict[str, torch.Tensor]]:
    """The model, cut, and its first weights."""
    torch.manual_seed(seed)
    full, _ = get_model("lenet", 10, IMAGE[0], IMAGE[1], width=width)
    state = {key: tensor.clone() for key, tensor in full.state_dict().items()}
    return cut_model(full.to("meta"), CUT), state


def make(kind: str, width: float, seed: int) -> tuple[SplitServer, tuple[int, ...]]:
    """A server's half, and the shape of one sample's activations."""
    cut, state = lenet(width, seed)
    return SplitServer(cut, state, MaskConfig(kind=kind), TRAIN), smashed_shape(cut.client, IMAGE)


def batch(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as they are behind a ReLU, and labels."""
    return torch.randn(BATCH, *shape, generator=generator).relu_(), torch.randint(10, (BATCH,), generator=generator)


def throughput(width: float, num_steps: int, seed: int) -> list[dict[str, Any]]:
    """Samples a CPU second of every kind of mask, and its ratio to no mask."""
    generator = torch.Generator().manual_seed(seed)
    steps: dict[str, Step] = {}
    for name, kind in MASKS.items():
        server, shape = make(kind, width, seed)
        a, y = batch(shape, generator)
        server.step(0, a, y, 1e-4)
        if name == HALF:  # masks begin with everything on
            switch_off_half(server, generator)
        steps[name] = partial(server.step, 0, a, y, 1e-4)
    typical = {name: typical_s(times) for name, times in take_turns(steps, num_steps).items()}
    return [
        {
            "mask": name,
            "samples_per_s": BATCH / typical[name],
            "ratio_to_unmasked": typical["none"] / typical[name],
            "target": "" if name == "none" else "met" if is_fast(typical["none"] / typical[name]) else "MISSED",
        }
        for name in MASKS
    ]


def switch_off_half(server: SplitServer, generator: torch.Generator) -> None:
    """Put every second logit of a client's mask, at random, below the threshold."""
    logits = server.served[0].logits
    assert logits is not None
    logits.masked_fill_(torch.rand(logits.shape, generator=generator) < 0.5, server.masks.threshold_logit - 1)


def is_fast(ratio: float) -> bool:
    """Whether masked replay is as fast as it should be."""
    return ratio >= TARGET_RATIO


def keeping_up(width: float, num_clients: int, num_rounds: int, seed: int) -> dict[str, Any]:
    """Replay of many clients with a mask each, whose masks fit no cache, and how slow devices that keeps up with."""
    server, shape = make("soft", width, seed)
    generator = torch.Generator().manual_seed(seed)
    seconds, own, step = [], [], client_step(width, seed)
    for number in range(num_rounds):
        work = [Work(number, pid, *batch(shape, generator)) for pid in range(num_clients)]
        replay = Replay(server, seed)
        replay.put(work, 1e-4, number)
        seconds.append(cpu_s_of(replay.finish))
        own += [cpu_s_of(step) for _ in range(5)]
    server_s, client_s = min(seconds[1:]) / num_clients, min(own[1:])
    return {
        "clients": num_clients,
        "samples_per_s": BATCH / server_s,
        "mask_mb_per_client": 12 * len(server.weights) / 1e6,  # logits and Adam's two moments
        "server_step_ms": 1e3 * server_s,
        "client_step_ms": 1e3 * client_s,
        "device_slowness_kept_up_with": num_clients * server_s / client_s,
    }


def client_step(width: float, seed: int) -> Step:
    """One step of a client's half and head on its contrastive loss."""
    cut, state = lenet(width, seed)
    part = copy.deepcopy(cut.client).to_empty(device="cpu")
    part.load_state_dict({key: state[key] for key in part.state_dict()})
    head = make_head(smashed_shape(cut.client, IMAGE))
    optimizer = make_saved_optimizer(TRAIN, [*part.parameters(), *head.parameters()], TRAIN.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(BATCH, *IMAGE, generator=generator), torch.randint(2, (BATCH,), generator=generator)

    def run() -> None:
        loss = nt_xent(head(part(x)), y, 0.07)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def memory_at(bound: int, num_clients: int, width: float, seed: int) -> dict[str, Any]:
    """Peak memory above the server's own while uploads of ``bound`` bytes come in beside a replay."""
    torch.set_num_threads(1)
    server, shape = make("soft", width, seed)
    generator = torch.Generator().manual_seed(seed)
    replay = Replay(server, seed)
    replay.put([Work(0, pid, *batch(shape, generator)) for pid in range(num_clients)], 1e-4, 0)
    replay.start()  # masks, their optimizers and what a step takes are the server's own, in the thread that steps
    replay.collect()
    settle()
    before = peak_bytes()
    num_steps = bound // (4 * BATCH * torch.Size(shape).numel())
    largest = 0
    for _ in range(3):
        work = [Work(s, pid, *batch(shape, generator)) for pid in range(num_clients) for s in range(num_steps)]
        largest = max(largest, held_bytes(work))
        replay.collect()
        replay.put(work, 1e-4, 0)
        del work
        replay.start()
    replay.collect()
    replay.close()
    peak, most = peak_bytes() - before, 2 * num_clients * bound
    return {
        "max_upload_bytes": bound,
        "clients": num_clients,
        "activations_of_one_stretch": largest,
        "bound_on_two_stretches": most,
        "peak_above_server": peak,
        "verdict": within(peak, most),
    }


def held_bytes(work: Sequence[Work]) -> int:
    """Bytes of activations that wait for their replay."""
    return sum(w.activations.numel() * w.activations.element_size() for w in work)


def cpu_s_of(call: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    call()
    return time.process_time() - began


if __name__ == "__main__":
    main()
