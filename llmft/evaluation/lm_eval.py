"""The bridge to lm-evaluation-harness (the optional extra `llmft[harness]`): its tasks, asked of a model that a trial adapted.

The harness makes prompts and metrics; every forward pass is ours, so that whatever a method does to a model takes part.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft.config import FileRef
from llmft.errors import UserError
from llmft.evaluation.perplexity import NO_ANSWER, UNBOUNDED
from llmft.models import AdaptedModel, all_logits, make_batch
from llmft.prompting import EncodedQueries
from llmft.records import Measure

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager


BOOTSTRAP = 1000  # resamples for the standard error of a metric that has no formula for it


def check_lm_eval(tasks: Sequence[str], folder: str | None = None) -> None:
    """Find what would keep these tasks from being measured, short of their data.

    Raises:
        UserError: the harness is not installed, or has no such task.
    """
    known = _manager(folder).all_tasks
    for name in tasks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
            hint = f"Nearest: {', '.join(near)}." if near else "lm-eval ls tasks lists them."
            raise UserError(f"harness: unknown task {name!r} (of {len(known)} tasks and groups). {hint}")


@lru_cache(maxsize=2)
def _manager(folder: str | None) -> TaskManager:
    """The harness's index of its tasks (it takes seconds to read), with those in `folder`."""
    if find_spec("lm_eval") is None:
        raise UserError("harness: lm-evaluation-harness is not installed. pip install 'llmft[harness]'")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"harness_dir: there is no folder {folder}. Give one that holds tasks as YAML files.")
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=folder)


def resolve_folder(folder: str) -> FileRef:
    """A folder of further tasks, with a fingerprint of every file in it.

    Raises:
        UserError: there is no such folder.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"harness_dir: there is no folder {root}. Give one that holds tasks as YAML files.")
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(root)}/{path.stat().st_size}/".encode() + path.read_bytes())
    return FileRef(path=str(root), fingerprint=digest.hexdigest()[:16])


def run_lm_eval(
    adapted: AdaptedModel, tokenizer, tasks: Sequence[str], *, folder: str | None = None, limit: int | None = None, length: int = UNBOUNDED,
    batch_size: int = 8, log_samples: bool = False, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The harness's own results of `lm_eval.simple_evaluate`, for the model as it is, with each task's own number of shots.

    It seeds the global generators of Python, numpy and torch, from none of which llmft draws.

    Args:
        adapted: the model, placed on its device.
        folder: further tasks.
        limit: examples of each task; None: all.
        length: tokens of a prompt at most, virtual ones included; the harness cuts longer ones on the left.
        log_samples: whether the results shall hold every example, its requests and the log-likelihoods.
        progress: whether the harness shows its progress on the terminal.

    Raises:
        UserError: the harness is not installed or has no such task, a task's data cannot be loaded, or the model cannot be asked.
    """
    check_lm_eval(tasks, folder)
    if adapted.method.has_own_head:
        raise UserError(
            f"harness: the method '{type(adapted.method).__name__}' answers with a head of its own and has no words for other tasks."
        )
    if getattr(adapted.network.config, "is_encoder_decoder", False):
        raise UserError("harness: only decoder models can be asked; this one is an encoder-decoder.")
    from lm_eval import simple_evaluate

    adapted.network.eval()
    with _quiet(), nullcontext() if progress else redirect_stderr(io.StringIO()):
        return simple_evaluate(
            _wrap(adapted, tokenizer, length, batch_size), tasks=_load(tasks, folder), task_manager=_manager(folder), limit=limit,
            log_samples=log_samples, bootstrap_iters=BOOTSTRAP,
        )  # fmt: skip


def _load(names: Sequence[str], folder: str | None) -> list[Task | Group]:
    """The tasks and groups with their data. A name may also be a tag, which stands for several tasks."""
    try:
        loaded = _manager(folder).load(list(names))
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # of datasets, the hub, the network, a task's own code
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"harness: cannot load {', '.join(names)} ({type(error).__name__}: {reason}). Their data comes from the hub: run it once "
            "with a network, or give local copies with a task of your own (harness_dir)."
        ) from None
    groups = [loaded["groups"][name] for name in names if name in loaded["groups"]]
    grouped = {task.task_name for group in groups for task in group.get_all_tasks()}
    return [*groups, *(task for name, task in loaded["tasks"].items() if name not in grouped)]


def measures(results: dict[str, Any]) -> list[Measure]:
    """Every number of `run_harness`, by task, then group."""
    found = []
    scores = results["results"] | results.get("groups", {})
    for name, values in scores.items():
        for key, value in values.items():
            metric, comma, rule = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{rule}")
            n = results["n-samples"].get(name, {}).get("effective")
            larger = results["higher_is_better"].get(name, {}).get(metric)
            found.append(
                Measure(
                    source="harness", name=name, metric=metric if rule == "none" else key, value=float(value), n=n,
                    stderr=float(stderr) if isinstance(stderr, int | float) else None, larger_is_better=larger is not False,
                )
            )  # fmt: skip
    return found


def _wrap(adapted: AdaptedModel, tokenizer, length: int, batch_size: int) -> HFLM:
    """The harness's own model for transformers, with our forward pass."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils_hf import stop_sequences_criteria

    class AdaptedLM(HFLM):
        def _model_call(self, inps, attn_mask=None, labels=None):
            rows = tuple(map(tuple, inps.tolist()))  # padded on the right, where a causal model does not look
            batch = make_batch(EncodedQueries(rows, (0,) * len(rows)), range(len(rows)), NO_ANSWER, adapted.model)
            with torch.no_grad():
                return adapted(all_logits, batch).float()

        def _model_generate(self, context, max_length, stop, **settings):
            if adapted.n_virtual_tokens:  # which the network's own `generate` does not know of
                return self._generate_by_logits(context, max_length, stop, **settings)
            with torch.no_grad(), adapted.model.autocast():
                return super()._model_generate(context, max_length, stop, **settings)

        def _generate_by_logits(self, context, max_length, stop, attention_mask, do_sample=False, **settings):
            """The best word after every row, again and again, without a cache."""
            if do_sample:
                raise UserError("harness: with a method that has virtual tokens, only tasks that decode greedily can be asked.")
            is_over = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
            while context.shape[1] < max_length and not (context.shape[1] > attention_mask.shape[1] and bool(is_over(context, None).all())):
                n_padding = (attention_mask == 0).sum(1).tolist()  # on the left
                rows = [row[n:] for row, n in zip(context.tolist(), n_padding, strict=True)]
                logits = self._model_call(
                    torch.tensor([row + [self.tokenizer.pad_token_id] * n for row, n in zip(rows, n_padding, strict=True)])
                )
                best = torch.stack([of_row[len(row) - 1].argmax() for of_row, row in zip(logits, rows, strict=True)])
                context = torch.cat([context, best[:, None]], 1)
            return context

    return AdaptedLM(
        pretrained=adapted.network, tokenizer=tokenizer, backend="causal", batch_size=batch_size,
        max_length=length - adapted.n_virtual_tokens,
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: the harness says nothing below an error."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
