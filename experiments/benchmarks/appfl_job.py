"""Time APPFL 1.12's simulator at the small job, in an environment without this library.

``PYTHON appfl_job.py STEPS COLLECT`` prints the seconds of that many global iterations. ``COLLECT``
is ``True`` or ``False``: whether APPFL collects all garbage after each of its steps, its default.
APPFL has many dependencies, so install it in an environment of its own:
``python -m venv DIR && DIR/bin/pip install appfl==1.12.0``. PYTHON is then ``DIR/bin/python``.
"""

import logging
import sys
import tempfile
import time
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from appfl.agent.sim_client import SimClientAgent  # pyright: ignore[reportMissingImports]
from appfl.agent.sim_server import SimServerAgent  # pyright: ignore[reportMissingImports]
from appfl.vsim import AsyncSimDriver, ClientProfile  # pyright: ignore[reportMissingImports]

PARTS = """
import torch

class Loss(torch.nn.CrossEntropyLoss):
    pass

def accuracy(labels, logits):
    return float((logits.argmax(-1) == labels).mean())

class Network(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
"""


def seconds(folder: Path, num_steps: int, collect: bool) -> float:
    """Return the seconds of ``num_steps`` reports of 4 clients; the last is 5 times slower."""
    parts = folder / "parts.py"
    parts.write_text(PARTS, encoding="utf-8")
    configuration = {
        "model_configs": {"model_path": str(parts), "model_name": "Network"},
        "log_configs": {"logging_output_dirname": str(folder)},
        "algorithm_configs": {
            "num_global_epochs": num_steps,
            "aggregator": "FedAsyncAggregator",
            "aggregator_kwargs": {
                "client_weights_mode": "equal",
                "alpha": 0.9,
                "staleness_fn": "constant",
            },
            "scheduler": "AsyncScheduler",
            "scheduler_kwargs": {"num_clients": 4},
            "trainer": "VanillaTrainer",
            "trainer_kwargs": {
                "mode": "step",
                "num_local_steps": 8,
                "train_batch_size": 32,
                "optim": "SGD",
                "optim_args": {"lr": 0.01, "momentum": 0.9},
                "loss_fn_path": str(parts),
                "loss_fn_name": "Loss",
                "metric_path": str(parts),
                "metric_name": "accuracy",
                "do_validation": False,
            },
        },
    }
    examples = torch.utils.data.TensorDataset(torch.ones(256, 64), torch.zeros(256).long())
    server = SimServerAgent(configuration)
    clients = [
        SimClientAgent(configuration, client_id=str(client), client_dataset=(examples,))
        for client in range(4)
    ]
    trainers = [client.trainer for client in clients]
    for part in (server, server.aggregator, server.scheduler, *clients, *trainers):
        part.optimize_memory = collect
    driver = AsyncSimDriver(
        server,
        clients,
        {str(client): ClientProfile(5.0 if client == 3 else 1.0) for client in range(4)},
        max_in_flight=4,
        logger=logging.getLogger("driver"),
        base_step_time=0.001,
    )
    start = time.perf_counter()
    driver.run()
    taken = time.perf_counter() - start
    assert len(driver.history) == num_steps
    return taken


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # APPFL prints to stdout
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        print(seconds(Path(folder), int(sys.argv[1]), sys.argv[2] == "True"), file=answer)
