"""One job by several processes: the bytes of one, whoever dies; errors of any of them; torchrun and --processes.

Where it does not matter, the processes are threads of this one: the same code over the same pipes, in less time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kill_campaign import digest
from safetensors.torch import load_file, save_file

import nybble
from nybble import QuantConfig
from nybble.checkpoint import StorageFullError, merging, processes, recorder, stream, together
from nybble.checkpoint.processes import PipeLink, take_part
from nybble.checkpoint.shard import Shard
from nybble.checkpoint.task import Output
from nybble.checkpoint.team import Leader, LostProcessError, Member, ReportedError
from nybble.checkpoint.together import spread
from nybble.errors import CheckpointError, CheckpointNotFoundError, NonFiniteError

CAMPAIGN = Path(__file__).parent / "kill_processes.py"
SHARD = 90_000
WEIGHTS = 8
DEFAULTS: dict[str, Any] = {
    "config": QuantConfig(),
    "max_shard_size": SHARD,
    "max_memory": None,
    "workers": 1,
    "restart": False,
    "progress": None,
    "calibration": None,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint without a config, which spares transformers' import; its output takes several files."""
    torch.manual_seed(0)
    directory = tmp_path / "src"
    directory.mkdir()
    weights = {f"layers.{i}.fc.weight": torch.randn(200 + i, 300).bfloat16() for i in range(WEIGHTS)}
    weights |= {f"layers.{i}.norm.weight": torch.randn(300) for i in range(WEIGHTS)}
    save_file(weights, directory / "model.safetensors")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(autouse=True)
def sync_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SYNC_SECONDS", 0.0)


def in_threads(
    size: int, src: Path, dst: Path, changes: dict[int, dict[str, Any]] | None = None, **settings: Any
) -> tuple[Any, list[Any]]:
    """(what rank 0 returns or raises, what the others do) with `changes` to the arguments of some ranks."""
    return call_in_threads(size, stream._quantize, {**DEFAULTS, "src": src, "dst": dst, **settings}, changes)


def call_in_threads(
    size: int, function: Callable[..., Any], common: dict[str, Any], changes: dict[int, dict[str, Any]] | None = None
) -> tuple[Any, list[Any]]:
    outcomes: list[Any] = [None] * size
    links: dict[int, PipeLink] = {}

    def part(make_team: Callable[[], Any], rank: int) -> None:
        arguments = {**common, **(changes or {}).get(rank, {})}
        try:
            outcomes[rank] = take_part(function, make_team(), arguments)
        except BaseException as error:
            outcomes[rank] = error

    threads = []
    for rank in range(1, size):
        here, there = multiprocessing.Pipe()
        links[rank] = PipeLink(here)
        team = lambda rank=rank, there=there: Member(PipeLink(there), rank, size, sharing=size)  # noqa: E731
        threads.append(threading.Thread(target=part, args=(team, rank), name=f"member {rank}"))
    for thread in threads:
        thread.start()
    part(lambda: Leader(links, sharing=size), 0)
    for thread in threads:
        thread.join()
    return outcomes[0], outcomes[1:]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_bytes_and_the_report_are_those_of_one_process(source: Path, tmp_path: Path, size: int) -> None:
    whole = nybble.quantize(source, tmp_path / "whole", max_shard_size=SHARD)
    seen: list[tuple[int, int, str]] = []
    report, others = in_threads(size, source, tmp_path / "out", progress=lambda *args: seen.append(args))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    for found in (report, *others):
        assert found.tensors == whole.tensors
        assert (found.bytes_after, found.shards) == (whole.bytes_after, whole.shards)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (report.bytes_before, report.bytes_before)
    assert {name for _, _, name in seen} == set(load_file(source / "model.safetensors"))


def test_a_merge_too(source: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    factors = {f"layers.{i}.fc.lora_A": torch.randn(2, 300) for i in (0, 3, 5)}
    factors |= {f"layers.{i}.fc.lora_B": torch.randn(200 + i, 2) for i in (0, 3, 5)}
    adapter = {f"base_model.model.{name}.weight": value for name, value in factors.items()}
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    whole = nybble.merge(source, tmp_path / "adapter", tmp_path / "whole", "nf4", max_shard_size=SHARD)
    arguments = {name: DEFAULTS[name] for name in ("max_shard_size", "max_memory", "workers", "restart", "progress")}
    arguments |= {"base": source, "adapter": tmp_path / "adapter", "dst": tmp_path / "out", "to": "nf4", "onto": None}
    arguments |= {"block_size": None, "search": "absmax", "absorb": False}
    report, (other, _) = call_in_threads(3, merging._merge, arguments)
    assert report.rows == other.rows == whole.rows
    assert len(report.rows) == 3
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_processes_without_a_file_are_told_of(source: Path, tmp_path: Path) -> None:
    report, _ = in_threads(2, source, tmp_path / "out", max_shard_size=1e9)
    note = "1 output file for 2 processes: 1 had nothing to do; a smaller max_shard_size makes more files"
    assert note in report.notes


def test_killed_at_any_step_any_number_of_processes_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    points = 20
    command = [sys.executable, CAMPAIGN, source, tmp_path / "runs", points, SHARD]
    (tmp_path / "runs").mkdir()
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["same"] == points
    # A process may be through before it comes to the step it was to die at; how often depends on the others.
    assert result["named"] > 0 and result["killed"] > points / 4


def test_an_interrupted_run_is_shared_by_what_is_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nybble.quantize(source, tmp_path / "whole", max_shard_size=SHARD)

    check, count = Output.check_complete, [0]

    def limited(self: Output) -> None:
        check(self)
        count[0] += 1
        if count[0] > 6:
            raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(Output, "check_complete", limited)
        error, others = in_threads(3, source, tmp_path / "out")
    assert isinstance(error, RuntimeError) and str(error) == "a bug"
    assert all(isinstance(other, ReportedError) and isinstance(other.__cause__, RuntimeError) for other in others)
    assert not [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    report, _ = in_threads(2, source, tmp_path / "out")
    assert 0 < report.resumed <= 6
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_an_error_of_the_callers_own_stops_all(source: Path, tmp_path: Path) -> None:
    def late(done: int, total: int, name: str) -> None:
        if done > total / 2:
            raise RuntimeError("a callback's bug")

    error, others = in_threads(3, source, tmp_path / "out", progress=late)
    assert str(error) == "a callback's bug"
    assert [str(other.__cause__) for other in others] == [str(error)] * 2
    assert in_threads(3, source, tmp_path / "out")[0].resumed > 0


@pytest.mark.parametrize("victim", range(WEIGHTS))
def test_an_error_in_the_data_of_any_process_leaves_nothing(source: Path, tmp_path: Path, victim: int) -> None:
    values = load_file(source / "model.safetensors")
    values[f"layers.{victim}.fc.weight"][3, 5] = float("nan")
    save_file(values, source / "model.safetensors")
    error, others = in_threads(3, source, tmp_path / "a" / "out")
    assert isinstance(error, NonFiniteError)
    assert error.name.startswith(f"layers.{victim}.fc.weight (")
    assert all(isinstance(other, ReportedError) for other in others)
    assert not (tmp_path / "a").exists()


def test_a_full_disk_of_another_machine(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    nybble.quantize(source, whole, max_shard_size=SHARD)
    finish = Shard.finish

    def full(self: Shard, texts: Any) -> None:
        if threading.current_thread().name == "member 1":
            raise StorageFullError(errno.ENOSPC, self.path)
        finish(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(Shard, "finish", full)
        error, _ = in_threads(2, source, out)
    assert isinstance(error, StorageFullError)
    assert f"weights are done and kept in {out}, the same command goes on" in str(error)
    report, _ = in_threads(4, source, out)
    assert report.resumed > 0
    assert digest(out) == digest(whole)


def test_what_differs_between_processes_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    error, _ = in_threads(2, source, out, {1: {"config": QuantConfig("fp4")}})
    assert isinstance(error, CheckpointError)
    assert str(error).startswith(f"rank 1 of 2 processes (process {os.getpid()} on {socket.gethostname()})")
    assert 'options: format was "nf4", is "fp4"' in str(error)
    error, _ = in_threads(2, source, out, {1: {"src": tmp_path / "absent"}})
    assert isinstance(error, CheckpointNotFoundError)
    error, (other,) = in_threads(2, source, out, {0: {"src": tmp_path / "absent"}})
    assert isinstance(error, CheckpointNotFoundError)
    assert isinstance(other, ReportedError) and isinstance(other.__cause__, CheckpointNotFoundError)
    assert not out.exists()
    monkeypatch.setattr(together, "VISIBLE_SECONDS", 0.1)
    error, _ = in_threads(2, source, out, {1: {"dst": tmp_path / "elsewhere"}})
    assert isinstance(error, CheckpointError)
    assert "elsewhere: rank 1 of 2 processes" in str(error) and "a file system that they share" in str(error)
    assert not (tmp_path / "elsewhere").exists()


def test_memory_is_what_the_processes_of_a_machine_take_together(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs at least ([\d,]+)") as alone:
        nybble.quantize(source, tmp_path / "out", max_memory=1e6)
    error, _ = in_threads(2, source, tmp_path / "out", max_memory=1_000_000)
    assert "max_memory: 1,000,000 bytes for 2 processes are too few" in str(error)
    least, needed = (int(str(e).rsplit(" ", 1)[1].replace(",", "")) for e in (alone.value, error))
    assert needed == 2 * least
    assert isinstance(in_threads(2, source, tmp_path / "out", max_memory=needed - 100)[0], CheckpointError)
    assert not isinstance(in_threads(2, source, tmp_path / "out", max_memory=needed)[0], Exception)


def test_a_process_that_leaves_early_is_named(source: Path, tmp_path: Path) -> None:
    class Gone(PipeLink):
        def receive(self) -> Any:
            message = super().receive()
            if "identity" in message:
                self.close()
            return message

    here, there = multiprocessing.Pipe()
    arguments = {**DEFAULTS, "src": source, "dst": tmp_path / "out"}
    left = threading.Event()

    def be_left() -> None:
        with pytest.raises(LostProcessError, match=r"rank 0 of 2 processes has ended .*its pipe is closed"):
            take_part(stream._quantize, Member(PipeLink(there), 1, 2, sharing=2), arguments)
        left.set()

    member = threading.Thread(target=be_left)
    member.start()
    with pytest.raises(LostProcessError, match=r"rank 1 of 2 processes has ended .*; nothing was left behind"):
        take_part(stream._quantize, Leader({1: Gone(here)}, sharing=2), arguments)
    member.join()
    assert left.is_set()
    assert not (tmp_path / "out").exists()


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_files_are_balanced(loads: list[int], size: int) -> None:
    """Graham's bound: whoever has most got its last file when it had least, so at most the mean before that file."""
    owners = spread(loads, size)
    assert len(owners) == len(loads) and set(owners) <= set(range(size))
    totals = [sum(load for load, owner in zip(loads, owners, strict=True) if owner == rank) for rank in range(size)]
    assert max(totals) <= sum(loads) / size + max(loads)


def test_files_are_balanced_by_bytes_not_by_number() -> None:
    owners = spread([1, 1, 1, 9, 1, 1, 1, 1, 1], 2)
    assert [owners.count(rank) for rank in (owners[3], 1 - owners[3])] == [1, 8]


def test_errors_survive_the_way_to_another_process() -> None:
    for error in (
        StorageFullError(errno.ENOSPC, Path("x")),
        LostProcessError(1, 2, "there", "killed"),
        NonFiniteError("w", 1, 1, "bad"),
    ):
        if hasattr(error, "outcome"):
            error.outcome = "kept"
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error) and copy.__dict__ == error.__dict__


def test_bad_numbers_of_processes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in (0, -1, True, 1.5, "mpi"):
        with pytest.raises(ValueError, match="processes: a number of processes, 1 or more, or 'torchrun' is needed"):
            nybble.quantize(source, tmp_path / "out", processes=bad)  # type: ignore[arg-type]
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"processes: 'torchrun' needs RANK, .* in the environment; torchrun sets it"):
        nybble.quantize(source, tmp_path / "out", processes="torchrun")
    with pytest.raises(ValueError, match="processes: with a calibration one process does the work, not 2"):
        nybble.quantize(source, tmp_path / "out", processes=2, calibration=torch.zeros(4, 8, dtype=torch.long))


# ---- as people start it ----------------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


def start(*command: object, **options: Any) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="finds children in /proc")
def test_an_interruption_from_the_keyboard_says_nothing_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """It reaches every process of the terminal, here while the second one still imports."""
    arguments = ("-m", "nybble", "quantize", source, tmp_path / "out", "--max-shard-size", "90KB", "--processes", 2)
    run = start(sys.executable, *arguments, start_new_session=True)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while len(found := children.read_text().split()) < 2:  # the other one is multiprocessing's own
        assert run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=300)
    assert (run.returncode, out.strip(), err) == (130, "", "")
    assert not (tmp_path / "out").exists()
    assert not any("multiprocessing.spawn" in command_of(child) for child in found)


def test_an_interruption_while_a_process_starts_ends_that_process_at_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C is held back during the start and raised right after it, before anybody waits for the process."""

    @contextlib.contextmanager
    def interrupted() -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "_deaf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nybble.quantize(source, tmp_path / "out", processes=2)
    assert not multiprocessing.active_children()
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "out").exists()


def test_an_interruption_that_somebody_swallows_is_raised_before_anything_is_in_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a bare `except:` does while a module is imported."""
    begin = Leader.begin

    def swallowing(*args: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        begin(*args)

    monkeypatch.setattr(Leader, "begin", swallowing)
    with pytest.raises(KeyboardInterrupt):
        nybble.quantize(source, tmp_path / "out", processes=2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not multiprocessing.active_children()


def command_of(process: str) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def test_the_command_with_processes(source: Path, tmp_path: Path) -> None:
    nybble.quantize(source, tmp_path / "whole", max_shard_size=SHARD)
    arguments = ("-m", "nybble", "quantize", source, tmp_path / "out", "--max-shard-size", "90KB", "--processes", 2)
    out, err = (run := start(sys.executable, *arguments)).communicate(timeout=300)
    assert run.returncode == 0, err
    assert out.count("written to") == 1
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


TWICE = """
import sys
from pathlib import Path
from nybble.cli.app import build

common = sys.argv[1:]
for name in ("out1", "out2"):
    sys.argv[1:] = [*common, str(Path(__file__).parent / name)]
    build()(standalone_mode=False)
"""


def test_two_agents_of_torchrun(source: Path, tmp_path: Path) -> None:
    """Two machines, as far as one can be two: each agent starts one process. Then they do another job."""
    nybble.quantize(source, tmp_path / "whole", max_shard_size=SHARD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1)
    where = ("--master-addr", "127.0.0.1", "--master-port", port)
    (script := tmp_path / "twice.py").write_text(TWICE)
    command = (script, "quantize", source, "--max-shard-size", "90KB")
    runs = [start(*torchrun, "--node-rank", rank, *where, *command) for rank in (0, 1)]
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert [out.count("written to") for out, _ in said] == [2, 0]
    assert digest(tmp_path / "out1") == digest(tmp_path / "out2") == digest(tmp_path / "whole")
