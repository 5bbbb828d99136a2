"""Packed checkpoints in transformers: `import kbvq`, then `AutoModelForCausalLM.from_pretrained(folder)`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

import kbvq_kernels
from kbvq.errors import CheckpointError, ConfigError, UnsupportedModelError
from kbvq.serving.packed_experts import packed_module
from kbvq.serving.packed_matrix import PackedEmbedding, PackedLinear, TiedHead
from kbvq.storage.checkpoint import FORMAT_VERSION, check_packed_contents, check_packed_tensors, read_file_headers
from kbvq.structures import PROJECTIONS, BankFormat, MatrixFormat, check_tiers

if TYPE_CHECKING:  # importing them loads torch._dynamo and Triton
    from transformers import PreTrainedModel

    from kbvq.models.moe_adapters import ExpertBank

logger = logging.getLogger("kbvq")

QUANT_METHOD = "kbvq"


class KbvqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint; `banks` and `dense` are all that loading needs, the rest
    describes.

    banks: one `BankFormat.to_dict()` per packed bank. dense: one `MatrixFormat.to_dict()` per packed matrix outside of
    them.
    Raises ConfigError for a format version, a field, a bank or a matrix that this version of kbvq cannot read.
    """

    def __init__(
        self,
        *,
        format_version: int | None = None,
        banks: Iterable[dict] = (),
        dense: Iterable[dict] = (),
        kbvq_version: str | None = None,
        recipe: dict | None = None,
        bits_per_weight: float | None = None,
        code_bits: float | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: object,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ConfigError(
                f"the packed checkpoint has format version {format_version}, this kbvq reads {FORMAT_VERSION}; "
                "upgrade kbvq, or quantize the model again"
            )
        if unknown:
            raise ConfigError(f"quantization_config has the unknown fields {sorted(unknown)}; upgrade kbvq")
        if not isinstance(banks, (list, tuple)):
            raise ConfigError(f"quantization_config lists no banks but {banks!r}; fetch the checkpoint again")
        if not isinstance(dense, (list, tuple)):
            raise ConfigError(f"quantization_config lists no matrices but {dense!r}; fetch the checkpoint again")
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers lists only its own methods
        self.format_version = format_version
        self.kbvq_version = kbvq_version
        self.recipe = recipe
        self.bits_per_weight = bits_per_weight
        self.code_bits = code_bits
        self.banks = list(banks)
        self.dense = list(dense)
        self.bank_formats()
        self.matrix_formats()

    def bank_formats(self) -> list[BankFormat]:
        return [BankFormat.from_dict(bank) for bank in self.banks]

    def matrix_formats(self) -> list[MatrixFormat]:
        return [MatrixFormat.from_dict(matrix) for matrix in self.dense]


class KbvqQuantizer(HfQuantizer):
    """Puts packed modules where the banks and matrices of `KbvqConfig` are, before transformers reads weights into
    them."""

    quantization_config: KbvqConfig
    requires_calibration = True  # transformers then refuses to quantize on the fly
    is_trainable = True  # what adapters beside packed weights need: gradients pass through those

    # The kernels are one custom op, and torch.compile(model, fullgraph=True) works once the model has run eagerly. This
    # flag would make generate compile unasked; it stays off until that has been measured on a GPU.
    is_compileable = False

    def is_serializable(self, *args: object, **kwargs: object) -> bool:
        return True

    def update_weight_conversions(self, weight_conversions: list, *args: object) -> list:
        """None: packed checkpoints hold the names of the model in memory, and some conversions from the hub's layout,
        such as transposing experts, would apply to those too. 5.17 calls it with one argument, later versions with two;
        5.4 knows no such call (check_names_are_kept)."""
        return []

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Check the files against the model and replace the modules of banks and matrices.

        transformers only warns about missing tensors, and may fill them with random numbers; here everything
        is compared with the headers of the files first. Raises CheckpointError naming the tensor.
        """
        from kbvq.models.layer_stream import check_names_are_kept
        from kbvq.models.moe_adapters import find_expert_banks

        files = checkpoint_files or []
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            raise CheckpointError(f"a packed checkpoint is loaded from its .safetensors files, not from {files}")
        headers = read_file_headers(files)
        formats = self.quantization_config.bank_formats()
        try:
            known = {bank.path: bank for bank in find_expert_banks(model)}
        except UnsupportedModelError as error:
            raise CheckpointError(f"{error}; load the checkpoint as {_architectures(model)}") from error
        tiers: dict[str, list[BankFormat]] = {}
        for bank in formats:
            check_packed_tensors(bank, headers)
            tiers.setdefault(bank.bank, []).append(bank)
        for path, of_bank in tiers.items():
            _replace_bank_(model, path, of_bank, known.get(path))
        matrices = self.quantization_config.matrix_formats()
        for matrix in matrices:
            check_packed_tensors(matrix, headers)
            _replace_matrix_(model, matrix)
        check_packed_contents([*formats, *matrices], files)
        check_names_are_kept(model, headers)
        in_torch = sorted({known[path].kind for path in tiers if known[path].activation is None})
        if in_torch:
            logger.warning(
                "the %s experts of %s have a gating that no kernel knows: they are decoded and multiplied in plain "
                "torch, which is slow",
                " and ".join(in_torch),
                type(model).__name__,
            )

        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for name, tensor in model.state_dict().items():
            if name not in headers and tied.get(name) not in headers:
                raise CheckpointError(
                    f"{name} of {type(model).__name__} is missing from the packed checkpoint; fetch it again, "
                    f"and load it as {_architectures(model)}"
                )
            if name in headers and headers[name].shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{name} is stored as {list(headers[name].shape)}, config.json makes it {list(tensor.shape)}; "
                    "fetch the checkpoint again"
                )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # Packed checkpoints hold the names of the model in memory: nothing was converted from the hub's layout. Later
        # versions of transformers see that; 5.4 lists every conversion that it knows for the model, and
        # save_pretrained would undo them, splitting codes as if they were the weights of single experts.
        model._weight_conversions = []  # type: ignore[assignment]
        return model


def register() -> None:
    """Make the quantization method known to transformers; repeated calls change nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(KbvqConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(KbvqQuantizer)


def _replace_bank_(model: PreTrainedModel, path: str, tiers: list[BankFormat], known: ExpertBank | None) -> None:
    """known: what the model has at that path. tiers: of the bank; one where it has none."""
    for tier in tiers:
        if known is None or known.kind != tier.kind:
            raise CheckpointError(
                f"{type(model).__name__} has no {tier.kind} experts at {path}; load the checkpoint as "
                f"{_architectures(model)}"
            )
        for projection in PROJECTIONS:
            format = getattr(tier, projection)
            experts, *shape = known.projection_shape(projection)
            shape = [len(tier.experts) or experts, *shape]
            if shape != [format.num_experts, format.out_features, format.in_features]:
                raise CheckpointError(
                    f"{tier.path}: config.json makes {projection} {shape}, its packed format says "
                    f"{[format.num_experts, format.out_features, format.in_features]}; fetch the checkpoint again"
                )
            refused = kbvq_kernels.supports(**format.expanded.to_dict(), activation=known.activation or "silu")
            if refused:
                raise CheckpointError(f"{tier.path}: {refused}; upgrade kbvq, or quantize the model again")
    assert known is not None
    try:
        check_tiers(path, known.num_experts, tiers)
    except ConfigError as error:
        raise CheckpointError(f"{error}; fetch the checkpoint again") from error
    from kbvq.models.moe_adapters import read_experts

    gating = read_experts(model.get_submodule(path)).gating
    with torch.device("meta"):
        model.set_submodule(path, packed_module(tiers[0], gating, known.activation, tiers[1:]))


def _replace_matrix_(model: PreTrainedModel, matrix: MatrixFormat) -> None:
    """A packed module in the place of a Linear or an Embedding, and one in that of the head that is tied to it. Raises
    CheckpointError when the model has another there."""
    expected = torch.nn.Linear if matrix.kind == "linear" else torch.nn.Embedding
    module = _module_at(model, matrix.path, expected)
    shape = (matrix.weight.out_features, matrix.weight.in_features)
    if tuple(module.weight.shape) != shape:
        raise CheckpointError(
            f"{matrix.path}: config.json makes it {list(module.weight.shape)}, its packed format says {list(shape)}; "
            "fetch the checkpoint again"
        )
    if refused := kbvq_kernels.supports(**matrix.weight.to_dict()):
        raise CheckpointError(f"{matrix.path}: {refused}; upgrade kbvq, or quantize the model again")
    replaced = [matrix.path]
    with torch.device("meta"):
        if matrix.kind == "linear":
            model.set_submodule(matrix.path, PackedLinear(matrix, module.bias))
        else:
            embedding = PackedEmbedding(matrix, module.weight.dtype, module.padding_idx)
            model.set_submodule(matrix.path, embedding)
            if matrix.tied_head:
                head = _module_at(model, matrix.tied_head, torch.nn.Linear)
                model.set_submodule(matrix.tied_head, TiedHead(embedding, head.bias))
                replaced.append(matrix.tied_head)
    # What is packed is tied by its modules, or not at all.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in list(tied.items()):
        if {target, source} & {f"{path}.weight" for path in replaced}:
            del tied[target]


def _module_at(model: PreTrainedModel, path: str, expected: type[torch.nn.Module]) -> Any:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if type(module) is not expected:
        raise CheckpointError(
            f"{type(model).__name__} has no {expected.__name__} at {path}; load the checkpoint as "
            f"{_architectures(model)}"
        )
    return module


def _architectures(model: PreTrainedModel) -> str:
    return " or ".join(model.config.architectures or ["the class it was made from"])


register()
