"""What a model of the hub is, without its weights: config and shard headers, some megabytes of hundreds of gigabytes.

A folder is made of them that looks like the downloaded model to whoever reads no weight: behind each header is a hole
as large as the tensors.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_safetensors_metadata, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from kbvq.errors import CheckpointError
from kbvq.models.layer_stream import check_model_name

_FAILURES: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
"""The last are those of the HTTP client beneath the hub's, which is another one in each of its versions."""


@contextmanager
def model_headers(name_or_path: str) -> Iterator[Path]:
    """The folder of a local model, or one of the headers of a hub model for as long as this is open.

    Raises CheckpointError when there is neither such a folder nor such a model, or the hub cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        yield path
        return
    check_model_name(name_or_path)
    with tempfile.TemporaryDirectory(prefix="kbvq-headers-") as made:
        folder = Path(made)
        try:
            shutil.copyfile(hf_hub_download(name_or_path, "config.json"), folder / "config.json")
            repository = get_safetensors_metadata(name_or_path)
        except _FAILURES as error:
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"there is no local folder {name_or_path}, and the hub did not tell what such a model is made of "
                f"({reason}); check the name and the connection, or pass a local folder"
            ) from error
        for shard, file in repository.files_metadata.items():
            write_header(folder / shard, {name: (t.dtype, tuple(t.shape)) for name, t in file.tensors.items()})
        if repository.sharded:
            index = {"weight_map": repository.weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        yield folder


def write_header(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of tensors (dtype in its notation, shape) that takes no room but for the header."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = _num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with open(path, "wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        stream.truncate(8 + len(content) + end)


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Of a tensor; a dtype's name ends in its bits, as in BF16, or has them behind its first letter, as in F8_E4M3."""
    bits = 8 if dtype == "BOOL" else int("".join(filter(str.isdigit, dtype.partition("_")[0])))
    size = bits
    for length in shape:
        size *= length
    return size // 8
