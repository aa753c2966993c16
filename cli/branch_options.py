"""The options of branches: their targets, their ranks, and the initial values of A and B."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from lora_fx.cli.options import FINITE, Rules, option, quantise_option, seed_option, selectors
from lora_fx.errors import NoSay
from lora_fx.text import JsonView

if TYPE_CHECKING:
    from lora_fx.fx.train.loss import Loss
    from lora_fx.inputs import Named
    from lora_fx.passes.verbs.options import InsertOptions


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Options for the targets of branches, their ranks, and the initial values of A and B."""

    plan: str | None = option(
        "--plan",
        metavar="PLAN",
        help="Take targets and ranks from a file that `lora-fx plan` wrote.",
    )
    rank: int = option("--rank", "-r", type=int, default=8, help="Set the rank of every target.")
    alpha: float | None = option(
        "--alpha", type=FINITE, help="Scale every update by alpha/rank.  [default: 2·rank]"
    )
    include: tuple[str, ...] | None = selectors(
        "--include", "Choose targets in place of the default ones, as q_proj,role:v,op:conv2d,re:…"
    )
    exclude: tuple[str, ...] | None = selectors("--exclude", "Leave out these targets.")
    also_train: tuple[str, ...] | None = selectors(
        "--also-train", "Train these tensors whole, such as a new head."
    )
    variant: str = option(
        "--variant",
        metavar="lora|rslora|dora|lora-fa|lora+|qalora[:G]|loha|vera",
        default="lora",
        help="Choose the form of the updates, and how they are trained.",
    )
    init: str = option(
        "--init",
        type=click.Choice(
            ["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora-ga"]
        ),
        default="kaiming",
        help="Choose the first values of A and B.",
    )
    dropout: float = option(
        "--dropout", type=float, default=0.0, help="Set the dropout on the inputs of the branches."
    )
    invocation: str | None = option(
        "--invocation",
        metavar="TEXT|IDS",
        help="Train an aLoRA, which acts from the last place on where these tokens stand: a text, "
        "or token ids as 529,13,882.",
    )
    quantise: tuple[str, ...] = quantise_option()
    seed: int = seed_option("Seed the first values of A and B.")
    dead: str = option(
        "--dead",
        type=click.Choice(["auto", "error", "drop", "keep", "allow"]),
        default="auto",
        help="Treat targets without effect: error refuses them, drop leaves them out, keep keeps "
        "them, allow tests none; auto refuses those you named and leaves out others.",
    )

    def insert(
        self,
        data: Iterable[Named] | None = None,
        loss: str | Loss = "ce",
        invocation: tuple[int, ...] | None = None,
    ) -> InsertOptions:
        """The options of an insert.

        Args:
            data: The batches for an `init` that reads data.
            loss: The loss for an `init` that reads gradients.
            invocation: The token ids that `--invocation` stands for.
        """
        from lora_fx.passes.verbs.options import InsertOptions

        return InsertOptions(
            plan=self.plan,
            rank=self.rank,
            alpha=self.alpha,
            include=self.include,
            exclude=self.exclude,
            also_train=self.also_train,
            variant=self.variant,
            init=self.init,
            dropout=self.dropout,
            seed=self.seed,
            dead=self.dead,
            data=data,
            loss=loss,
            invocation=invocation,
        )


def _scale_is_one(asked: JsonView) -> bool:
    from lora_fx.adapter.variant import named_variant

    return named_variant(asked["variant"]).scale_is_one


PLANNED: Rules = (
    NoSay(
        ("rank", "alpha", "include"),
        lambda asked: bool(asked["plan"]),
        "with --plan {0[plan]}",
        "leave one of them out",
    ),
    NoSay(("alpha",), _scale_is_one, "with variant {0[variant]}, whose scale is 1"),
)
"""Combinations in which an option has no effect and is refused."""
