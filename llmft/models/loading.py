"""Models: where they lie, and how a trial borrows one.

A process keeps the base models that it used lately, untouched, in memory; a trial that trains gets a copy and may do with it
what it likes. So nothing can leak from one trial into the next, whatever a method changes. A process that was started for one
trial alone keeps nothing.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pickle import UnpicklingError
from typing import Any

import torch

from llmft.config import ModelRef
from llmft.errors import UserError
from llmft.hub import fetch_model, hub_access
from llmft.models.architectures import DROPOUT, language_model, last_states, own_logits

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK = 64  # numbers that share a scale; bitsandbytes' default and the paper's (Dettmers et al. 2023)


def _load_from_folder(ref: ModelRef, load, what: str, **arguments) -> Any:
    """Call one of transformers' loaders on the model's folder, and turn what it raises into one line."""
    from safetensors import SafetensorError

    folder = ref.path or fetch_model(ref.name, ref.revision, weights=what == "weights")
    try:
        with hub_access(offline=True):  # everything is there; an outage of the hub must not be noticed
            return load(folder, **arguments)
    except (OSError, ValueError, KeyError, ImportError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model: cannot load the {what} from the folder {folder}: {reason} Check that the folder is complete.") from None


@lru_cache(maxsize=4)
def load_tokenizer(ref: ModelRef):
    """The tokenizer, with a padding token (its ids are masked, so which one does not matter).

    Raises:
        UserError: it cannot be loaded, or there is none.
    """
    from transformers import AutoTokenizer

    tokenizer = _load_from_folder(ref, AutoTokenizer.from_pretrained, "tokenizer")
    if len(tokenizer) == len(tokenizer.all_special_ids):  # what transformers makes of a folder without one
        raise UserError(f"model: {ref.name} comes without a tokenizer. Put its base model's tokenizer files into a local copy of it.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


@lru_cache(maxsize=4)
def load_config(ref: ModelRef):
    """The model's configuration.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoConfig

    return _load_from_folder(ref, AutoConfig.from_pretrained, "configuration")


@dataclass
class LoadedModel:
    """A network in a trial's hands.

    Attributes:
        network: a language model of transformers, causal or with an encoder; methods may add modules to it.
        device, precision: where it computes, and "fp32", "bf16" or "fp16".
        plain_head: whether the logits are just the output embedding times the last hidden state (a few architectures scale or cap
            them; then the network's own forward is used).
        base_names: the parameters that the network came with, also if untied since; any other was added by a method.
    """

    network: Any  # a PreTrainedModel, to which methods add modules by any name
    device: torch.device
    precision: str
    plain_head: bool
    base_names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.base_names = frozenset(name for name, _ in self.network.named_parameters())

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads the prompt, and a decoder of its own says the answer."""
        return self.network.config.is_encoder_decoder

    @property
    def width(self) -> int:
        """The size of the hidden state that the output embedding reads."""
        return self.network.get_output_embeddings().weight.shape[1]

    @property
    def dropout(self) -> float:
        """The hidden dropout of the network's configuration; 0 where its architecture has none."""
        config = self.network.config
        names = DROPOUT.get(config.model_type, ())
        return float(getattr(config, names[0], 0.0) or 0.0) if names else 0.0

    def autocast(self):
        """The context in which forward passes run: half precision where the trial asks for it, weights stay fp32 when trained."""
        return torch.autocast(self.device.type, HALF[self.precision]) if self.precision in HALF else nullcontext()


KEPT_SHARE = 1 / 16  # of the host's memory: what a process keeps of bases besides the one in use; several processes share a host
_BASE: dict[tuple, tuple[torch.nn.Module, bool]] = {}  # the one used last at the end


def _load_base(ref: ModelRef, dropout: float | None, base_weights: str = "fp32") -> tuple[torch.nn.Module, bool]:
    """The untouched network on the CPU, in fp32 or quantised; from this process's memory if it was used lately."""
    key = (ref.name, ref.revision, ref.fingerprint, dropout, base_weights)
    if key in _BASE:
        _BASE[key] = _BASE.pop(key)
    else:
        from transformers.utils import logging as transformers_logging

        config, changed = load_config(ref), {}
        if dropout is not None:
            if config.model_type not in DROPOUT:
                raise UserError(
                    f"train.dropout: the name of the dropout of {config.model_type!r} models is not known. Set it to null to keep the "
                    f"model's own. Known: {', '.join(sorted(DROPOUT))}."
                )
            changed = dict.fromkeys(DROPOUT[config.model_type], dropout)
        if base_weights == "nf4":
            changed |= {"quantization_config": nf4(), "device_map": {"": "cpu"}}
        transformers_logging.disable_progress_bar()  # of the weights' loading; downloads show theirs
        network, loading = _load_from_folder(
            ref, language_model(config).from_pretrained, "weights", dtype=torch.float32, output_loading_info=True, **changed
        )
        if missing := sorted(loading["missing_keys"]):  # transformers would go on with random numbers in their place
            raise UserError(
                f"model: the weights of {ref.name} lack {len(missing)} tensors ({', '.join(missing[:3])} ...). Fetch them again."
            )
        check_quantized(network.requires_grad_(False).eval())
        _make_room(_n_bytes(network))
        _BASE[key] = network, _has_plain_head(network)
    return _BASE[key]


def _make_room(n_bytes: int) -> None:
    """Forget bases, those not used for longest first, until another of `n_bytes` may be kept; one alone always may."""
    room = KEPT_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    while _BASE and n_bytes + sum(_n_bytes(network) for network, _ in _BASE.values()) > room:
        del _BASE[next(iter(_BASE))]


def _n_bytes(network: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))


@torch.no_grad()
def _has_plain_head(network) -> bool:
    """Compare the output embedding's product with the network's own logits on three tokens."""
    head, ids = network.get_output_embeddings(), torch.tensor([[5, 6, 7]])
    if head is None:
        return False
    return bool(torch.allclose(head(last_states(network, ids)), own_logits(network, ids), atol=1e-5, rtol=1e-5))


@contextmanager
def borrow_model(
    ref: ModelRef,
    precision: str,
    device: torch.device,
    dropout: float | None = None,
    copied: bool = True,
    kept: bool = True,
    base_weights: str = "fp32",
) -> Iterator[LoadedModel]:
    """A network to work with, every parameter frozen. It lies on the CPU, for `Runtime.wrap` to put where it shall be.

    Args:
        device: where it will be.
        copied: whether the caller will change it. Without a copy the weights are only read; in half precision they are then
            stored in half as well.
        kept: whether this process will need the base model again. If not, the caller gets the base itself: one copy in memory
            instead of two.
        base_weights: `Method.base_weights`.

    Raises:
        UserError: the weights cannot be loaded.
    """
    network, plain_head = _load_base(ref, dropout, base_weights)
    if not kept:
        _BASE.popitem()  # the one used last
    elif copied or precision in HALF or device.type != "cpu":
        network = copy.deepcopy(network)
    if not copied and precision in HALF:
        network.to(dtype=HALF[precision])
    try:
        yield LoadedModel(network, device, precision, plain_head)
    finally:
        del network
        if device.type == "cuda":
            torch.cuda.empty_cache()


def check_bitsandbytes(what: str) -> None:
    """Find out early whether bitsandbytes is there.

    Raises:
        UserError: it is not; the line begins with `what` needs it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs bitsandbytes, which is not installed here: pip install 'llmft[qlora]'.")


def check_quantized(network) -> None:
    """Make sure of layers that bitsandbytes holds in 4 bits, where there are any, before their first forward pass.

    They keep the order in which they were packed: on some CPUs bitsandbytes would change it in a pass without gradients, and a GPU
    could not read them then.

    Raises:
        UserError: a layer reads a width that is no multiple of a block's 64 numbers; on CPUs bitsandbytes unpacks it wrongly.
    """
    for name, module in network.named_modules():
        if type(module).__name__ == "Linear4bit":
            if module.in_features % BLOCK:
                raise UserError(
                    f"model: {name} reads {module.in_features} numbers, and in 4 bits that must be a multiple of {BLOCK}. Use lora."
                )
            module.support_avx512bf16_for_cpu = False


def nf4():
    """What transformers shall do with the linear layers: NF4 in blocks of 64, scales quantised again, products in bf16."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )


def n_parameters(network: torch.nn.Module) -> int:
    """How many numbers a network has; where they are held in 4 bits, a byte holds two."""
    return sum(parameter.numel() * (2 if parameter.dtype is torch.uint8 else 1) for parameter in network.parameters())


def checksum(network: torch.nn.Module) -> str:
    """A hash of every parameter and buffer, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
