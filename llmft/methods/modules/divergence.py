"""Divergences between distributions. All take log-probabilities [..., outcomes] and give [...]; nats for kl and js."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F

Divergence = Literal["kl", "js", "mse", "l1"]


def divergence(kind: Divergence, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Compute the divergence of the student's distribution from the teacher's.

    "kl" is KL(teacher || student); "js" Jensen-Shannon, (KL(teacher || m) + KL(student || m)) / 2 with m their mean; "mse" and
    "l1" the sums over the outcomes of squared and of absolute differences of the probabilities.
    """
    if kind == "kl":
        return _kl(teacher, student)
    if kind == "js":
        middle = torch.logaddexp(teacher, student) - math.log(2)
        return (_kl(teacher, middle) + _kl(student, middle)) / 2
    difference = teacher.exp() - student.exp()
    return (difference.square() if kind == "mse" else difference.abs()).sum(-1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def keep_and_sum_rest(log_probabilities: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Gather the log-probabilities of the tokens `kept`, and last that of all others together (Askell et al. 2021, appendix B.5).

    Args:
        log_probabilities: of all tokens, [..., vocabulary].
        kept: [..., k], their ids.

    Returns:
        [..., k + 1], summing to one.
    """
    others = log_probabilities.scatter(-1, kept, -math.inf)
    return torch.cat([log_probabilities.gather(-1, kept), others.logsumexp(-1, keepdim=True)], -1)
