"""Models in Hugging Face's format: what their files hold, and where on the Hub they are.

Hugging Face and we name parameters as OpenAI did, so little is to be done: transformers keeps a
layer's weights as (in, out) and we as (out, in), and it writes each byte of a token as a visible
character. Only safetensors are read: a pickle could run anything.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from checkpoint import META, MODEL, Checkpoint, Meta, find_checkpoint, save_tensors, write_meta
from common.errors import UserError, one_line, reason_of
from common.files import disk_errors, is_odd, is_there
from common.hub import check_gated, hub_errors
from common.records import read_json
from model import GPT, GPTConfig
from shards import VOCABULARY, TokenizerRecord
from tokenizer import (
    END_OF_TEXT,
    MAX_VOCAB_SIZE,
    gpt2_encoding,
    make_encoding,
    merge,
    save_vocabulary,
    vocabulary_of,
)

# OpenAI's four models. Every other name is a repository of the Hub, owner/name[@revision].
SUFFIXES = ("", "-medium", "-large", "-xl")
NAMES = {f"gpt2{suffix}": f"openai-community/gpt2{suffix}" for suffix in SUFFIXES}

CONFIG, VOCAB, MERGES, INDEX = "config.json", "vocab.json", "merges.txt", f"{MODEL}.index.json"
TOKENIZER = "tokenizer.json"  # both vocabulary and merges; alone since transformers 5.0
TOKENIZER_CONFIG = "tokenizer_config.json"
WANTED = [CONFIG, VOCAB, MERGES, TOKENIZER, TOKENIZER_CONFIG]  # of a repository
WANTED += [MODEL, "model-*.safetensors", INDEX]
PREFIX = "transformer."
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # older files hold the causal mask of every block

# What a config.json must say to be GPT-2's architecture; the first is transformers' default.
EXPECTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}

# What a tokenizer.json must say to cut and merge as GPT-2 does, in the same way.
TOKENIZER_EXPECTED = {
    "pre_tokenizer": {
        "type": ("ByteLevel",),
        "add_prefix_space": (False,),
        "use_regex": (True,),
    },
    "model": {
        "type": ("BPE",),
        "dropout": (None, 0),
        "ignore_merges": (False,),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
    },
}

# The sizes that a config.json tells, and the largest that is believed.
SIZES = {"vocab_size": MAX_VOCAB_SIZE, "n_positions": 1 << 20, "n_layer": 1000, "n_head": 1 << 12}
SIZES["n_embd"] = 1 << 16


# The Hub


def find_model(name: str) -> Checkpoint:
    """The checkpoint that a user means, to use its model: a checkpoint folder, a run's newest, or a
    model on the Hub (gpt2, owner/name), which is fetched and converted if it hasn't been yet.

    Raises UserError if there is none.
    """
    if not is_hub_name(name):
        try:
            return find_checkpoint(name)
        except UserError as error:
            if is_there(Path(name)):
                raise
            raise UserError(
                f"{error}; models on the Hub are {', '.join(NAMES)}, owner/name"
            ) from error
    folder = cached(name)
    try:
        return find_checkpoint(str(folder))
    except UserError as error:
        way_out = f"delete the folder {folder}: {name} is converted again then"
        raise UserError(f"{error}; {way_out}") from error


def is_hub_name(name: str) -> bool:
    """Whether a name is one of the Hub's, rather than a path here that isn't there (yet).

    Raises UserError for a name that nothing can have, and if it can't be known what is here.
    """
    if "\0" in name:
        raise UserError(f"{name!r:.80}: neither a path nor a name of the Hub has a zero byte")
    if name in NAMES:
        return not is_there(Path(name))
    looks_so = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) is not None
    return looks_so and not is_there(Path(name).parent)


def download(name: str) -> Path:
    """A model's files from the Hub, in its own cache; a download that broke off goes on.

    Raises UserError if they can't be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    repository, _, revision = NAMES.get(name, name).partition("@")
    told = f"there is no folder {name} here, and {repository} can't be had from the Hub"
    with hub_errors(repository, told):
        try:
            files = snapshot_download(repository, revision=revision or None, allow_patterns=WANTED)
        except RepositoryNotFoundError as error:
            check_gated(repository, error)  # a GatedRepoError is "not found", too
            raise UserError(f"{name}: neither a checkpoint here nor a model on the Hub") from error
    return Path(files)


def cached(name: str) -> Path:
    """The checkpoint folder of a model on the Hub: converted once, then kept in XDG_CACHE_HOME, by
    default ~/.cache.

    Raises UserError if it can't be had, is no GPT-2, or can't be kept.
    """
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a user without a name, in a container
        raise UserError(f"{error} Name a folder to keep {name} in: XDG_CACHE_HOME") from error
    files = download(name)  # …/models--owner--name/snapshots/<commit>
    cache = Path(home, "gpt2-from-scratch")
    final = cache / files.parent.parent.name / files.name
    if not is_there(final / META):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=final.parent) as folder:
                from_hf(files, Path(folder, "new"))
                Path(folder, "new").replace(final)
        except OSError as error:
            if is_there(final / META):  # another process was quicker
                return final
            if is_there(final):
                raise UserError(f"{final} lacks its {META}: delete that folder") from error
            raise UserError(
                f"can't keep {name} in {cache}: {one_line(error)}; XDG_CACHE_HOME may name another "
                "folder to keep it in"
            ) from error
    return final


# A folder as transformers saves it


def from_hf(folder: Path, out: Path) -> None:
    """Turn a folder as transformers saves it into a checkpoint folder.

    Raises UserError, naming the file or the value, for what is not GPT-2.
    """
    check_files(folder)
    config = read_config(folder)
    tensors = rename(read_weights(folder), folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    check_shapes(tensors, shapes, folder)
    encoding = make_encoding(read_vocabulary(folder, config.vocab_size))
    if padding := config.vocab_size - encoding.n_vocab:
        print(
            f"{folder}: of {config.vocab_size:,} tokens the last {padding:,} are in no vocabulary: "
            "padding, left out",
            file=sys.stderr,
        )
        config = replace(config, vocab_size=encoding.n_vocab)
        tensors["wte.weight"] = tensors["wte.weight"][: encoding.n_vocab].clone()
    with whole(out) as new:
        save_tensors(tensors, new / MODEL)
        sha256 = save_vocabulary(encoding, new / VOCABULARY)
        meta = Meta(
            step=0,
            model=config,
            tokenizer=TokenizerRecord(encoding.name, encoding.n_vocab, sha256),
            config={},
            val_loss=None,
            best_val_loss=None,
            scaler=None,
            data="",
        )
        write_meta(new, meta, files=(MODEL,))


def check_files(folder: Path) -> None:
    """Raises UserError for what is to be read and is no file: a pipe would be waited for."""
    with disk_errors(f"can't read {folder}"):
        for path in (path for pattern in WANTED for path in folder.glob(pattern)):
            if is_odd(path):
                raise UserError(f"{path} is not a regular file")


def read_config(folder: Path) -> GPTConfig:
    """The model's shape. Raises UserError for one that our model can't have."""
    path = folder / CONFIG
    content = read_object(path)
    check_settings(content, EXPECTED, f"{path}")
    for key, most in SIZES.items():
        size = content.get(key)
        if type(size) is not int or not 1 <= size <= most:
            raise UserError(
                f"{path} has {key} = {size!r:.40}, expected a whole number from 1 to {most:,}"
            )
    n_embd, block_size = content["n_embd"], content["n_positions"]
    if content.get("n_inner") not in (None, 4 * n_embd):
        raise UserError(f"{path} has n_inner = {content['n_inner']!r:.40}, GPT-2 has {4 * n_embd}")
    try:
        return GPTConfig(
            content["vocab_size"], block_size, content["n_layer"], content["n_head"], n_embd
        )
    except ValueError as error:
        raise UserError(f"{path} is no configuration of GPT-2: {error!r}") from error


def check_settings(content: dict, expected: dict[str, tuple], where: str) -> None:
    """Raises UserError for a setting that isn't as expected; one that is absent is the first."""
    for key, allowed in expected.items():
        if content.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where} has {key} = {content[key]!r:.40}, GPT-2 has {allowed[0]!r}")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that its index names.

    Raises UserError for what is no safetensors file, and for a tensor that two files have.
    """
    files = [MODEL]
    if (folder / INDEX).exists() and not (folder / MODEL).exists():
        files = read_index(folder / INDEX)
    tensors: dict[str, Tensor] = {}
    for name in files:
        more = read_tensors(folder, name)
        if twice := sorted(tensors.keys() & more.keys()):
            raise UserError(
                f"{folder}: {name!r:.80} has {twice[0]!r:.80}, which a file before it has"
            )
        tensors |= more
    return tensors


def read_index(path: Path) -> list[str]:
    """The files in which a large model's tensors are. Raises UserError for what can't be a name."""
    weight_map = read_object(path).get("weight_map")
    named = isinstance(weight_map, dict) and weight_map.values()
    if not named or not all(isinstance(name, str) for name in named):
        raise UserError(f'{path}: expected a "weight_map" of tensors to files')
    for name in named:
        if name in ("", "..") or Path(name).name != name:
            raise UserError(f"{path} names the file {name!r:.80}, expected a plain name")
    return sorted(set(named))


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file. Raises UserError if it isn't there or is no safetensors file."""
    path, shown = folder / name, f"{name!r:.80}"
    if os.path.exists(path) and not os.path.isfile(path):  # a folder, or a pipe to wait for
        raise UserError(f"{folder}: {shown} is not a file, expected one of weights")
    try:
        return load_file(path)
    except (FileNotFoundError, ValueError) as error:  # ValueError: a name that no file can have
        told = f"{INDEX} names it; fetch it again"
        if name == MODEL:
            told = "only safetensors are read: a pickle (pytorch_model.bin) could run any code"
        raise UserError(f"{folder} has no {shown}: {told}") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: {shown} is no safetensors file: {one_line(error)}") from error


def rename(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Their tensors by our names, float32 and (out, in).

    Raises UserError for an untied head, and for a tensor that is there twice or holds no numbers.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(PREFIX)
        if name.endswith(MASKS):
            continue
        if name in ours:
            raise UserError(f"{folder} has {name!r:.80} twice, with and without {PREFIX!r}")
        if not tensor.is_floating_point():
            raise UserError(f"{folder}: {name!r:.80} is of {tensor.dtype}, expected floating-point")
        tensor = tensor.T if name.endswith(TRANSPOSED) and tensor.ndim == 2 else tensor
        ours[name] = tensor.float().contiguous()
        if not ours[name].isfinite().all():
            raise UserError(f"{folder}: {name!r:.80} holds numbers that are not finite")
    head = ours.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, ours.setdefault("wte.weight", head)):
        raise UserError(f"{folder}: lm_head.weight differs from wte.weight, GPT-2 has one for both")
    return ours


def check_shapes(tensors: dict[str, Tensor], shapes: dict[str, torch.Size], folder: Path) -> None:
    """Raises UserError, naming the first tensor that is missing, too many, or of another shape."""
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise UserError(f"{folder} has no {missing[0]}, which GPT-2 needs")
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise UserError(f"{folder} has {unknown[0]!r:.80}, which GPT-2 doesn't know")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{folder}: {name} has the shape {tuple(tensors[name].shape)} here, by "
                f"{CONFIG} it would be {tuple(shape)} (weights as (out, in))"
            )


def read_vocabulary(folder: Path, vocab_size: int) -> dict[bytes, int]:
    """`{token's bytes: id}` without <|endoftext|>, which must be the last id, below `vocab_size`.

    There may be fewer ids: many pad their embeddings to a multiple of 64 or 128. A folder without
    vocab.json and tokenizer.json is taken to have GPT-2's. Raises UserError if the files don't
    agree, or if the merges are not those that the ids tell.
    """
    if (folder / TOKENIZER_CONFIG).exists():  # its word counts more than that of tokenizer.json
        told = read_object(folder / TOKENIZER_CONFIG)
        check_settings(told, {"add_prefix_space": (False, None)}, f"{folder / TOKENIZER_CONFIG}")
    found, merges = {}, {}
    if (folder / VOCAB).exists():
        found[VOCAB] = tokens_of(read_object(folder / VOCAB), vocab_size, folder / VOCAB)
    if (folder / MERGES).exists():
        merges[MERGES] = read_merges(folder / MERGES)
    if (folder / TOKENIZER).exists():
        ids, merges[TOKENIZER] = read_tokenizer(folder / TOKENIZER)
        found[TOKENIZER] = tokens_of(ids, vocab_size, folder / TOKENIZER)
    if not found and not 0 <= vocab_size - gpt2_encoding().n_vocab < 128:
        raise UserError(f"{folder} has no {VOCAB}, and {vocab_size:,} tokens are not GPT-2's")
    vocabulary, *other = found.values() or [vocabulary_of(gpt2_encoding())]
    if other not in ([], [vocabulary]):
        raise UserError(f"{folder}: {VOCAB} and {TOKENIZER} hold different vocabularies")
    expected = spelled_merges(vocabulary) if merges else []
    for name, lines in merges.items():
        if lines != expected:
            raise UserError(f"{folder / name}: its merges are not those of the vocabulary")
    return vocabulary


def tokens_of(ids: dict[str, object], vocab_size: int, path: Path) -> dict[bytes, int]:
    """The tokens' bytes in the order of their ids, from tokens as they are spelled in a file."""
    ids, bytes_of = dict(ids), {text: byte for byte, text in byte_characters().items()}
    last = ids.pop(END_OF_TEXT, None)
    whole_numbers = all(type(number) is int for number in (last, *ids.values()))
    in_order = whole_numbers and [*sorted(ids.values()), last] == [*range(len(ids) + 1)]
    if not in_order or len(ids) >= vocab_size:
        raise UserError(
            f"{path}: expected the ids 0 to {vocab_size - 1:,}, or fewer, {END_OF_TEXT} as the last"
        )
    try:
        tokens = {bytes(bytes_of[character] for character in text): ids[text] for text in ids}
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]!r} stands for no byte") from error
    if b"" in tokens:
        raise UserError(f"{path} has an empty token")
    for byte in range(256):
        if bytes([byte]) not in tokens:
            raise UserError(f"{path} has no token for the byte {byte}")
    return dict(sorted(tokens.items(), key=lambda item: item[1]))


def read_merges(path: Path) -> list[str]:
    """The lines of a merges.txt but for its first, the version. Raises UserError if unreadable."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path}: {one_line(error)}") from error
    return [line for line in lines if line and not line.startswith("#version")]


def read_tokenizer(path: Path) -> tuple[dict[str, object], list[str]]:
    """(ids, merges) of a tokenizer.json. Raises UserError if it works in another way than GPT-2's.

    <|endoftext|> may be among its added tokens only. Older files, those of OpenAI's models among
    them, don't tell the model's type: it is BPE if it has merges.
    """
    content = read_object(path)
    check_settings(content, {"normalizer": (None,)}, f"{path}")
    for part, expected in TOKENIZER_EXPECTED.items():
        if not isinstance(content.get(part), dict):
            raise UserError(f"{path} has no {part}, GPT-2's has one")
        check_settings(content[part], expected, f"{path}: its {part}")
    model = content["model"]
    try:
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        if not all(isinstance(text, str) for text in added):
            raise TypeError("a token is no text")
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        return {**model["vocab"], **added}, merges
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} holds no vocabulary with merges: {error!r:.80}") from error


def read_object(path: Path) -> dict:
    """A JSON object. Raises UserError if it can't be read or is something else."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path}: {reason_of(error)}") from error


def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in vocab.json: itself where it can be seen.

    The others take the characters from 256 on, in order. Source: openai/gpt-2 `src/encoder.py`.
    """
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte if byte in seen else 256 + unseen.index(byte)) for byte in range(256)}


def spelled_merges(ranks: dict[bytes, int]) -> list[str]:
    """The lines of merges.txt."""
    characters = byte_characters()
    return [
        " ".join("".join(characters[byte] for byte in part) for part in pair)
        for pair in merges_of(ranks)
    ]


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes was merged from, in the order of learning.

    A token's own bytes, merged by what was learned before it, end as that pair. Raises UserError if
    they don't: transformers would never make that token, and tiktoken only of a whole word.
    """
    pairs = []
    for token in ranks:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            neighbours = [left + right for left, right in zip(parts, parts[1:])]
            first = min(neighbours, key=lambda pair: ranks.get(pair, MAX_VOCAB_SIZE))
            if first not in ranks:
                raise UserError(
                    f"{token.decode(errors='replace')!r:.80} is a token of the vocabulary that no "
                    "merge of two others makes: transformers can't have it"
                )
            parts = merge(parts, first)
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


# Writing


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` if all goes well; else nothing is left of it.

    If `out` is there, and empty, its files are moved in, those that vouch for the others last: it
    may be a disk's, or behind a link. Raises UserError if it can't be written.
    """
    try:
        is_there_already = out.is_dir()
        out.parent.mkdir(parents=True, exist_ok=True)
        place = out if is_there_already else out.parent
        with tempfile.TemporaryDirectory(dir=place, prefix=".partial-") as folder:
            new = Path(folder, "new")
            new.mkdir()
            yield new
            if is_there_already:
                for path in sorted(new.iterdir(), key=lambda path: path.name in (META, CONFIG)):
                    path.replace(out / path.name)
            else:
                new.replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't write {out}: {one_line(error)}") from error
