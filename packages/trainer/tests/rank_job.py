"""What the ranks of the tests of launching run: they go on until they are stopped, fail on request, have a helper.

rank_job.py HOME [gloo]      with gloo they exchange a number again and again, so that a lost one is felt
"""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from trainer import TrainConfig, launch, lost

HOME, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
CONFIG = TrainConfig(
    data_path=(Path("-"),), model_config=Path("-"), output_dir=Path("RUN"), train_iters=1, seq_length=1,
    global_batch_size=1, lr=1.0, distributed_timeout_minutes=0.5,
)  # fmt: skip


def save_and_exit(*_):
    time.sleep(0.5)  # a checkpoint takes its time
    with (HOME / f"saved-{RANK}").open("a") as file:
        file.write("once ")
    sys.exit(143)


def exchange():
    import torch

    torch.distributed.init_process_group("gloo")
    while True:
        torch.distributed.all_reduce(torch.ones(1))
        tell("running")
        if RANK == 1 and (HOME / "fail").exists():
            raise RuntimeError("boom")
        time.sleep(0.01)


def wait():
    tell("running")
    while True:
        time.sleep(0.1)


def tell(name):
    (HOME / f"{name}-{RANK}").write_text(str(os.getpid()), "utf-8")


def main():
    launch.end_with_parent()
    helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
    helper.start()
    (HOME / f"helper-{RANK}").write_text(str(helper.pid), "utf-8")
    try:
        if "gloo" in sys.argv:
            with lost.named(CONFIG):
                exchange()
        signal.signal(signal.SIGTERM, save_and_exit)
        wait()
    except Exception as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
