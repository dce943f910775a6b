# SPDX-License-Identifier: Apache-2.0
"""One rank of a peer of bench/collectives.py: all-reduces of float32 by MPI or gloo, timed.

    mpirun -n 2 python collective_peer.py mpi
    python collective_peer.py gloo RANK RANKS PORT

Rank 0 says what it is as a line of JSON, then for every line `BYTES CALLS` on standard input the
seconds of each call as another; an empty line ends it.  Between turns nobody spins: what waits is
the other processes' turn.  Needs mpi4py or torch, and nothing of Spanker.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np

WARM_UP = 3
IDLE_S = 0.001


def time_calls(call: Callable[[], object], calls: int) -> list[float]:
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


def read_turn() -> list[int]:
    return [int(word) for word in sys.stdin.readline().split()]


def mpi() -> None:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world.rank == 0:
        library = MPI.Get_library_version().split(",")[0].strip()
        say({"library": library, "ranks": world.size})
    while True:
        if world.rank == 0:
            turn = read_turn()
            for rank in range(1, world.size):
                world.send(turn, rank)
        else:
            # A blocking receive would spin.
            while not world.iprobe(0):
                time.sleep(IDLE_S)
            turn = world.recv(source=0)
        if not turn:
            return
        array = np.full(turn[0] // 4, 0, np.float32)
        world.Barrier()
        times = time_calls(lambda array=array: world.Allreduce(MPI.IN_PLACE, array), turn[1])
        if world.rank == 0:
            say(times)


def gloo(rank: int, ranks: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )
    if rank == 0:
        say({"library": f"gloo of torch {torch.__version__}", "ranks": ranks})
    while turn := read_turn():
        array = torch.zeros(turn[0] // 4)
        dist.barrier()
        times = time_calls(lambda array=array: dist.all_reduce(array), turn[1])
        if rank == 0:
            say(times)
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "mpi":
        mpi()
    else:
        gloo(*(int(argument) for argument in sys.argv[2:]))
