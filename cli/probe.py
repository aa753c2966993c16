"""lora-fx probe: make the probe of an adapter, and ask a server whether it serves the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_fx.cli.adapter_arguments import adapter_of
from lora_fx.cli.file_command import ReportCommand
from lora_fx.cli.options import Rules, force_option, option, option_group, repeatable, trust_option
from lora_fx.cli.output import emit, note
from lora_fx.errors import LoraFxError, NoSay
from lora_fx.text import Json, some

if TYPE_CHECKING:
    from lora_fx.probe.language import LanguageProbe
    from lora_fx.probe.probe import Probe

NO_SAY: Rules = (
    NoSay(
        ("served_model", "base_model", "others", "timeout"),
        lambda asked: not asked["server"],
        "without --server URL",
    ),
    NoSay(("trust",), lambda asked: not asked["base"], "without --base MODEL"),
    NoSay(
        ("output",), lambda asked: not asked["base"],
        "without --base MODEL, of which a probe is made", "pass --base MODEL",
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options for the server that is asked, and for what it should serve."""

    server: str | None = option(
        "--server",
        metavar="URL",
        help="Ask this OpenAI-compatible server, and nobody else; LORA_FX_SERVER_TOKEN in the "
        "environment is its token.",
    )
    served_model: str | None = option(
        "--model", metavar="NAME", help="Name the model under which the server has the adapter."
    )
    base_model: str | None = option(
        "--base-model", metavar="NAME", help="Ask also for the base, which has this name there."
    )
    others: tuple[str, ...] = repeatable(
        "--other", "ADAPTER", "Say so if this adapter, which has a probe too, is served instead."
    )
    timeout: float = option(
        "--timeout",
        type=click.FloatRange(0.1, 86_400),
        default=120.0,
        metavar="SECONDS",
        help="Wait this long for each answer.",
    )


@click.command("probe", cls=ReportCommand, no_say=NO_SAY)
@click.argument("adapter")
@click.option("--base", metavar="MODEL", help="Make the probe with this base model.")
@click.option("-o", "--output", metavar="FILE", help="Write the probe to this file or folder.")
@option_group("serving", ServerOptions)
@trust_option
@force_option
def command(
    adapter: str,
    base: str | None,
    output: str | None,
    serving: ServerOptions,
    trust: bool,
    force: bool,
) -> None:
    r"""Make the probe of ADAPTER, or ask a server whether it serves ADAPTER.

    With --base, ADAPTER and its base model are run, and what they answer is the probe. With
    --server, a running server of a language model is asked the same, and the answer says whether it
    serves this adapter, the base, this adapter with another scale or without some of its targets,
    or something else. The probe is then read from lora_fx_probe.json in the folder ADAPTER, or from
    ADAPTER itself if it is such a file.

    Exit codes: 0 if the server serves the adapter, 1 if it does not, 2 if it cannot be asked.

    \b
    lora-fx probe ./adapter --base ./llama -o ./adapter
    lora-fx probe ./adapter --server http://localhost:8000 --model my-adapter
    lora-fx probe ./adapter --server http://localhost:8000 --model my-adapter --base-model llama
    """
    from lora_fx.files.replaceable import PROBE
    from lora_fx.probe.probe_file import write_probe

    if not base and not serving.server:
        raise LoraFxError(
            "nothing is asked for", "pass --base MODEL -o FILE, or --server URL --model NAME"
        )
    if not output and not serving.server:
        raise LoraFxError("no output is given", "pass -o FILE")
    probe: Probe | None = None
    inputs: Json = {"adapter": adapter}
    fields: Json = {}
    lines: list[str] = []
    outputs: list[str] = []
    if base:
        from lora_fx.passes.verbs.export_probe import summary

        inputs["base"] = base
        probe = _made(adapter, base, trust)
        fields["probe"] = summary(probe)
    if probe is not None and output:
        path = Path(output) / PROBE if Path(output).is_dir() else Path(output)
        write_probe(probe, path, force=force)
        outputs.append(str(path))
        lines.append(f"wrote {path}")
    ok = True
    if serving.server:
        text, answers = _asked(adapter, probe, serving)
        ok = answers.pop("ok")
        fields |= answers
        lines.append(text)
    emit("\n".join(lines), ok=ok, inputs=[inputs], outputs=outputs, **fields)
    click.get_current_context().exit(0 if ok else 1)


def _made(adapter: str, base: str, trust: bool) -> Probe:
    """Make the probe of an adapter, and print what it does not show."""
    from lora_fx.passes.verbs.probe_for_server import probe_for_server

    probe, notes = probe_for_server(base, adapter_of(adapter), trust=trust)
    note(*notes)
    return probe


def _asked(adapter: str, probe: Probe | None, serving: ServerOptions) -> tuple[str, Json]:
    """Ask the server, and return the answer as text and for --json."""
    from lora_fx.probe.asked_models import Question, ask_server
    from lora_fx.probe.server import Server

    assert serving.server is not None
    server = Server(serving.server, serving.timeout)
    name, language = _question_of(adapter, probe)
    others = dict(_question_of(other, None) for other in serving.others)
    if not serving.served_model:
        raise _no_model(server)
    question = Question(name, language, serving.served_model, serving.base_model, others)
    report = ask_server(server, question)
    note(*report.notes)
    return str(report), report.to_json()


def _question_of(adapter: str, probe: Probe | None) -> tuple[str, LanguageProbe]:
    """Return the name of an adapter, and the question of its probe.

    Raises:
        LoraFxError: There is no probe, or it has no question for a server.
    """
    from lora_fx.files.replaceable import PROBE
    from lora_fx.formats.io import adapter_name
    from lora_fx.probe.language import LanguageProbe
    from lora_fx.probe.probe_file import read_probe

    if probe is None:
        probe = read_probe(adapter)
    if probe.language is None or len(probe.adapters) != 1:
        raise LoraFxError(
            f"{adapter}: its probe has no question for a server",
            "make a probe with the folder of a causal language model that has a tokenizer: "
            f"lora-fx probe {adapter} --base MODEL -o {adapter} --force",
        )
    path = Path(adapter)
    name = adapter_name(path.parent if path.name == PROBE else path)
    return name, LanguageProbe.from_json(probe.language, adapter)


def _no_model(server: object) -> LoraFxError:
    """Return the error for a missing --model, with the names that the server lists."""
    from lora_fx.probe.completions import model_names
    from lora_fx.probe.server import Server

    assert isinstance(server, Server)
    server.get("/models")  # raises where there is no server
    names = model_names(server)
    listed = f": the server lists {some(names, 8)}" if names else ""
    return LoraFxError("--server needs the name of the model", f"pass --model NAME{listed}")
