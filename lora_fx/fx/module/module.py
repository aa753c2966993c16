"""The module behind insert and fold: one skeleton of tensors, and many programs over it.

A program is an eval or train graph, for one base dtype and one set of arguments, rewritten by the
module's passes and compiled to plain functions over the skeleton. Programs that were not needed
yet are captured on first use.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lora_fx.conditions import Condition
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, NoMemberError
from lora_fx.fx import codes, dotted_names, quantised_parameters, tensors
from lora_fx.fx.capture.call import leaves_of, program_key
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.cleaned_graph import Traced
from lora_fx.fx.capture.expert_forms import has_grouped
from lora_fx.fx.capture.model_source import base_dtype
from lora_fx.fx.capture.onnx_names import output_name
from lora_fx.fx.dotted_names import all_tensors
from lora_fx.fx.fake_tensors import is_fake
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.module import codegen
from lora_fx.fx.module.block_checkpoints import Recomputing, checkpointer, refuse_inlined
from lora_fx.fx.module.codegen import inlined_blocks
from lora_fx.fx.module.loss_output import keep_loss
from lora_fx.fx.module.norm_statistics import freeze_norms
from lora_fx.fx.shards import run_gathered, uncalled_units
from lora_fx.fx.skeleton import Skeleton
from lora_fx.fx.tensors import to_numpy
from lora_fx.fx.trees import tree_leaves, tree_unflatten
from lora_fx.inputs import Named
from lora_fx.patching import patched

Rewriter = Callable[[FxGraph], object]
Program = tuple[str, Traced]
"""A program: the name of its code, and its trace with accepted sizes and output tree."""
Speedups = Callable[[Sequence[str], bool], list[Rewriter]]
"""The passes that make programs cheaper, for the paths of a module's blocks and for a mode."""


# The weightless copy holds the model's code: the user's module with every tensor faked. Captures
# trace that, so the module keeps its mode and its statistics, and no weight is held twice.


class Scope(nn.Module):
    """One module of the skeleton; only a block with its own function can be called."""

    recompute = False
    """Whether to save only this block's inputs and run it again in backward."""
    _again = staticmethod(checkpointer({}))

    def __getitem__(self, index: int | slice | str) -> Any:
        """Return children by position, slice or name, as Sequential and ModuleDict do."""
        if isinstance(index, str):
            return self._modules[index]
        return list(self._modules.values())[index]

    def forward(self, program: str | Callable[[], Any], *args: object) -> Any:
        """Run this block's part of a program, or what reads the tensors of this module."""
        if callable(program):
            return program()
        programs: Any = getattr(self, "_programs", None)
        if programs is None:
            raise LoraFxError(
                f"{type(self).__name__} is a part of a captured model and cannot be called alone",
                "call the whole model; its parts hold the tensors",
            )
        code = programs.codes[program, self._path]
        if self.recompute and self.training and torch.is_grad_enabled():
            code = functools.partial(self._again, code)
        units = uncalled_units(self, functools.partial(programs.calls, program))
        return run_gathered(units, lambda: code(self, *args))


@functools.cache
def scope_class(name: str) -> type[Any]:
    """Return a subclass of Scope with the user's class name, for printing and wrap policies."""
    return type(name, (Scope,), {"__module__": __name__})


def blocks_of(root: nn.Module) -> dict[str, Scope]:
    """Return the children of the outermost ModuleLists and Sequentials, by path, each once."""
    blocks: dict[str, Scope] = {}
    for name, module in root.named_modules():
        # by name: tools such as FSDP2 make subclasses, and Sequential became a Scope here
        classes = {base.__name__ for base in type(module).__mro__}
        if not classes & {"ModuleList", "Sequential"}:
            continue
        if any(name == path or name.startswith(f"{path}.") for path in blocks):
            continue
        for key, child in module._modules.items():
            if isinstance(child, Scope) and all(child is not block for block in blocks.values()):
                blocks[f"{name}.{key}".lstrip(".")] = child
    return blocks


def _check_free(module: nn.Module, root: type[nn.Module]) -> None:
    """Raise for a tensor, or a child with tensors, whose name `root` or its code uses."""
    tensors = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    for name in dict.fromkeys(tensor.partition(".")[0] for tensor in tensors):
        if hasattr(root, name) or (name == "self" and name in tensors):
            raise LoraFxError(
                f"{type(module).__name__}.{name} holds weights, but the module that insert "
                f"returns uses the name {name} itself",
                "rename it; or use lora_fx.attach, which adapts your own module and keeps such "
                "names",
            )


@dataclass
class Programs:
    """The compiled code of a captured module; copies share code, but not later captures.

    Attributes:
        captured: Where graphs come from.
        codes: (program, block) → its function; the whole is the block "".
        compiled: What a call is told by → the programs for it, of other sizes each.
        blocks: Whether blocks have functions of their own.
        few: Whether programs run once or twice: their graphs are interpreted, since it takes longer
            to generate and compile their code than to run them.
        inlined: Blocks that could not be told apart from the whole.
    """

    captured: Captured
    codes: dict[tuple[str, str], Callable[..., Any]] = field(default_factory=dict)
    compiled: dict[tuple[object, ...], list[Program]] = field(default_factory=dict)
    blocks: bool = True
    few: bool = False
    inlined: set[str] = field(default_factory=set)

    def calls(self, ident: str, module: nn.Module) -> bool:
        """Whether a program calls a module, as a block with its own function."""
        return (ident, module.__dict__.get("_path")) in self.codes

    def anew(self) -> Programs:
        """Return the programs of the same captures, of which none is compiled yet."""
        return replace(self, codes={}, compiled={}, inlined=set(self.inlined))

    def __deepcopy__(self, memo: dict[int, object]) -> Programs:
        """Copy the dictionaries, but not what they hold."""
        compiled = {k: list(v) for k, v in self.compiled.items()}
        return replace(self, codes=dict(self.codes), compiled=compiled)


class CapturedModule(Recomputing, Scope):
    """A captured model as a module with the original names, signature and output type."""

    _fast: Speedups | None = None
    _invoked: tuple[str, tuple[int, ...]] = ("", ())
    """The argument with token ids, and the tokens in it that invoke the adapter, if some do."""
    _loss_alone = False
    """Whether programs give the model's loss and None for its other outputs."""

    def __init__(
        self,
        captured: Captured,
        own: Sequence[str] = (),
        *,
        norm_stats: str = "frozen",
        blocks: bool = True,
        tree: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.__class__ = with_signature(type(self), captured)
        tree = captured.model if tree is None else tree
        self._programs = Programs(captured, blocks=blocks)
        self._norm_stats = norm_stats
        self._adapted = True
        first_names, _ = dotted_names.named_tensors(tree)
        self._ties = {name: first for name, first in first_names.items() if name != first}
        trained_names = {first_names[name] for name in own}
        quantised = sorted(trained_names & quantised_parameters.forms(tree).keys())
        if quantised:
            raise LoraFxError(
                f"{quantised[0]} is quantised, and cannot be trained whole",
                "leave it out of also_train: it can be trained by a branch",
            )
        _check_free(tree, type(self))
        trained = {
            id(parameter) for name, parameter in tree.named_parameters() if name in trained_names
        }
        Skeleton(lambda name: scope_class(name)(), trained).of(tree, self)
        self._dtype = base_dtype(self) or captured.base_dtype
        self._shared = True
        self.eval()

    # --- calling ---------------------------------------------------------------------------------

    def _run(self, args: Sequence[Any], kwargs: Named) -> Any:
        programs = self._programs
        named = programs.captured.signature.bind(args, kwargs)
        leaves = tree_leaves(named)
        ident, traced = self._program(named, leaves)
        code = programs.codes[ident, ""]
        units = uncalled_units(self, functools.partial(programs.calls, ident))
        out = run_gathered(units, lambda: code(self, *leaves))
        return tree_unflatten(list(out), traced.out_spec)

    def _program(self, named: Named, leaves: Sequence[Any]) -> Program:
        """Return the program for a call, which is captured if there is none."""
        # Nothing flips flags or dtypes in a graph: another mode, dtype or set of arguments is
        # another program, captured when it is first called for. So are sizes at which the model's
        # code takes another path.
        state = (self.training, self._dtype, self._adapted, self._loss_alone)
        key = (*state, *program_key(named, leaves))
        for program in self._programs.compiled.get(key, ()):
            if program[1].door.admits(leaves):
                return program
        captured: Program = self._capture(key, named)
        return captured

    def _rewrite(self, graph: FxGraph, training: bool) -> None:
        """Turn a captured graph into this module's graph."""

    def _rewrite_program(self, graph: FxGraph, training: bool) -> None:
        """Turn a captured graph into the program that calls run."""
        self._rewrite(graph, training)

    def graph(
        self, training: bool = False, *, portable: bool = False, named: Named | None = None
    ) -> FxGraph:
        """Return the rewritten graph for a call, or for the captured call; passes may edit it.

        A portable one has no op that only torch's own kernels or another library know.
        """
        named = self._programs.captured.named if named is None else named
        graph = self._graph(training, named)
        if portable and has_grouped(graph.graph):
            return self._graph(training, named, portable=True)
        return graph

    def _graph(self, training: bool, named: Named, *, portable: bool = False) -> FxGraph:
        captured = self._programs.captured
        traced = captured.traced(training, named, self._dtype, portable=portable)
        graph = self._placed(traced, training)
        if self._adapted:
            self._rewrite(graph, training)
        graph.lint()
        return graph

    def _placed(self, traced: Traced, training: bool) -> FxGraph:
        """Return a captured graph over this module's tensors."""
        graph = traced.fx_graph(self, training)
        self._place_constants(graph, traced.constants)
        self._place_bodies(graph)
        if training and self._norm_stats == "frozen" and freeze_norms(graph.graph):
            graph.changed()
        return graph

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _capture(self, key: tuple[object, ...], named: Named) -> Program:
        programs = self._programs
        programs.captured.allows(self.training, self._norm_stats)
        traced = programs.captured.traced(self.training, named, self._dtype)
        traced.door.check(tree_leaves(named))
        return self._generate(key, traced)

    def _generate(self, key: tuple[object, ...], traced: Traced) -> Program:
        """Generate the code of a program in the module's present state."""
        programs = self._programs
        graph = self._placed(traced, self.training)
        if self._adapted:
            self._rewrite_program(graph, self.training)
        graph.lint()
        if self._loss_alone and keep_loss(graph.graph, traced.out_spec):
            graph.changed()
        blocks = self._blocks() if programs.blocks else {}
        if self._fast is not None and self._adapted:
            for speedup in self._fast(tuple(blocks), self.training):
                speedup(graph)
        graph.lint()

        ident = f"program_{sum(map(len, programs.compiled.values()))}"
        if programs.few:
            codes = {"": codegen.interpreted(graph.graph)}
        else:
            codes = codegen.compile_program(graph.graph, ident, tuple(blocks))
        programs.inlined |= inlined_blocks(graph.graph, tuple(blocks))
        recomputed = {path: block for path, block in blocks.items() if block.recompute}
        refuse_inlined(recomputed, programs.inlined)
        for path, code in codes.items():
            programs.codes[ident, path] = code
        programs.compiled.setdefault(key, []).append((ident, traced))
        return ident, traced

    def _generate_again(self) -> None:
        """Generate the code of every program again, for other branches.

        Code that is being compiled cannot: torch.compile does not see through a capture.
        """
        before = self._programs.compiled
        self._programs = self._programs.anew()  # copies of this module may run the old ones
        for key, programs_of_key in before.items():
            training, dtype, adapted, loss_alone, *_ = key
            state = {"training": training, "_dtype": dtype, "_adapted": adapted}
            with patched(self, **state, _loss_alone=loss_alone):
                for _, traced in programs_of_key:
                    self._generate(key, traced)

    def _blocks(self) -> dict[str, Scope]:
        """Return the blocks that programs call, by path."""
        blocks = blocks_of(self)
        for path, block in blocks.items():
            moves = self._norm_stats == "update" and next(block.buffers(), None) is not None
            block.__dict__ |= {"_path": path, "_programs": self._programs, "_moves": moves}
        return blocks

    def _place_constants(self, graph: FxGraph, constants: Mapping[str, torch.Tensor]) -> None:
        """Store the tensors that forward makes as `_constN` buffers; equal ones share a buffer."""
        state = all_tensors(self)
        buffer_names: dict[str, str] = {}
        for name, tensor in constants.items():
            if name in state:
                continue
            if is_fake(tensor):
                raise LoraFxError(
                    f"forward makes the tensor {name!r}, which has no value outside the capture",
                    "register it as a buffer of the module",
                )
            buffer_names[name] = self._constant(tensor)
        for node in graph.graph.find_nodes(op="get_attr"):
            node.target = buffer_names.get(str(node.target), node.target)
        graph.refresh()

    def _place_bodies(self, graph: FxGraph) -> None:
        """Store the bodies of higher-order ops as attributes `_bodyN`; these hold no tensors."""
        names = {
            id(attribute): name
            for name, attribute in self.__dict__.items()
            if name.startswith("_body")
        }
        bodies = {}
        for node in graph.graph.find_nodes(op="get_attr"):
            body = graph.bodies.get(str(node.target))
            if body is not None:
                name = names.setdefault(id(body), f"_body{len(names)}")
                node.target = name
                bodies[name] = body
        self.__dict__.update(bodies)
        graph.bodies = bodies

    def _constant(self, value: torch.Tensor) -> str:
        """Return the name of the buffer for a constant; equal constants share a buffer."""
        constants = {
            name: buffer
            for name, buffer in self._buffers.items()
            if name.startswith("_const") and buffer is not None
        }
        for name, buffer in constants.items():
            if buffer.dtype != value.dtype or buffer.shape != value.shape:
                continue
            if torch.equal(buffer, value.to(buffer.device)):
                return name
        device = next((parameter.device for parameter in self.parameters()), value.device)
        # not persistent: the state dict keeps the names of the original and no others
        name = f"_const{len(constants)}"
        self.register_buffer(name, value.detach().clone().to(device), persistent=False)
        return name

    # --- what nn.Module offers -------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> object:
        # scales and zeros are part of the codes' values: no cast of the model rounds them
        exact_buffers = list(self._buffers_of_codes())
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved: dict[int, torch.Tensor] = {}
        for module, name, exact in exact_buffers:
            cast = module._buffers[name]
            if exact is not None and cast is not None:
                module._buffers[name] = moved.setdefault(id(exact), exact.to(cast.device))
        # where all is codes, no parameter tells
        sample = torch.empty(0, dtype=self._dtype or torch.float32)
        self._dtype = base_dtype(self) or fn(sample).dtype
        return result

    def _buffers_of_codes(self) -> Iterator[tuple[nn.Module, str, torch.Tensor | None]]:
        """Yield (module, name, buffer) of the scales, zeros and orders of quantised parameters."""
        for module in self.modules():
            for leaf in module.__dict__.get(codes.HELD, ()):
                for part in codes.PARTS:
                    name = f"{leaf}_{part}"
                    if name in module._buffers:
                        yield module, name, module._buffers[name]

    def load_state_dict(self, state_dict: Named, *args: Any, **kwargs: Any) -> object:
        """Load as nn.Module does; copy the storage shared with the user's model first."""
        # copying in place would write through the shared storage into the user's model
        if self._shared:
            for parameter in self.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.clone()
            self._shared = False
        return super().load_state_dict(state_dict, *args, **kwargs)

    def conditions(self, training: bool = False) -> tuple[Condition, ...]:
        """Return the size conditions under which the example's graph equals the model."""
        captured = self._programs.captured
        return captured.traced(training, captured.named, self._dtype).door.conditions

    def base(self) -> contextlib.AbstractContextManager[None]:
        """Return a block in which the module gives the unadapted model's numbers."""
        return patched(self, _adapted=False)


def by_output(out: Any) -> dict[str, Array]:
    """Return the tensors among a model's outputs, by output name."""
    return {
        output_name(path): to_numpy(leaf)
        for path, leaf in leaves_of({"": out})
        if isinstance(leaf, torch.Tensor)
    }


def with_signature(base: type[Any], captured: Captured) -> type[Any]:
    """Return a subclass with the model's class name and the signature of its forward."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the captured program with the original arguments."""
        return self._run(args, kwargs)

    original = captured.signature.signature
    parameters = [
        parameter for parameter in original.parameters.values() if parameter.name != "self"
    ]
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if parameters and parameters[0].kind is inspect.Parameter.POSITIONAL_ONLY:
        kind = inspect.Parameter.POSITIONAL_ONLY
    self_parameter = inspect.Parameter("self", kind)
    # Trainer reads it to drop the columns of a data set that the model does not take
    signature = original.replace(parameters=[self_parameter, *parameters])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    attributes = {"forward": forward, **_face(captured.model)}
    return type(type(captured.model).__name__, (base,), attributes)


def _face(model: nn.Module) -> dict[str, object]:
    """Return the attributes that trainers read of a transformers model, if its class has them.

    Device and dtype are those of the parameters now; the config is the user's own object.
    """
    names: dict[str, object] = {}
    own = type(model)
    if isinstance(getattr(own, "device", None), property):
        names["device"] = property(tensors.device_of)
    if isinstance(getattr(own, "dtype", None), property):
        names["dtype"] = property(lambda self: self._dtype)
    if "config" in model.__dict__:
        names["config"] = property(lambda self: self._programs.captured.model.config)
    if callable(getattr(own, "generate", None)):
        names["generate"] = _generate
        names["__getattr__"] = _attribute
    if callable(getattr(own, "tie_weights", None)):
        names["tie_weights"] = _tie_weights
    return names


def _tie_weights(self: CapturedModule, *_: object, **__: object) -> None:
    """Let the names of a tied weight have one parameter again, as the same method of transformers.

    accelerate calls it after it has put the weights of each name in place.
    """
    for name, first in self._ties.items():
        module, leaf = dotted_names.owner(self, name)
        if leaf in module._parameters:
            module._parameters[leaf] = dotted_names.parameter_of(self, first)


def _attribute(self: CapturedModule, name: str) -> object:
    """Return a parameter, buffer or submodule; raise with a hint for what TRL's trainers read.

    They write to the config of generation, and go on to members that no graph has.

    Raises:
        AttributeError: There is none of this name.
    """
    if name == "generation_config":
        raise NoMemberError(
            f"this {type(self).__name__} runs captured graphs and has no generation_config, which "
            "TRL's trainers need",
            "give them your own model: lora_fx.attach(model, args, kwargs, rank=…) adapts it in "
            "place",
        )
    return nn.Module.__getattr__(self, name)


def _generate(self: CapturedModule, *args: object, **kwargs: object) -> None:
    """Raise, since a captured graph has no key-value cache to generate with."""
    raise LoraFxError(
        f"this {type(self).__name__} runs captured graphs, which have no key-value cache to "
        "generate with",
        "generate with your own model: adapter = module.adapter(); lora_fx.attach(model, args, "
        "kwargs, adapter=adapter); model.generate(…)",
    )
