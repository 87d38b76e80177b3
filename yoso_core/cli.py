"""The command line: ``yoso``, or ``python -m yoso_core``."""

import dataclasses
import importlib.util
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yoso_core.files import written_folder
from yoso_core.memory import in_words

if TYPE_CHECKING:
    from rich.console import Console

    from yoso_core.planning import Plan

app = typer.Typer(
    name="yoso",
    help="YOSO attention: linear-cost self-attention by LSH sampling. What runs here, how right it is, and how fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
NumHash = Annotated[int, typer.Option(help="m: hashes per vector.")]
HashCodeLen = Annotated[int, typer.Option(help="tau: bits per hash code, 1 to 30.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


def main() -> None:
    """Run the command line, and see that what it printed has arrived."""
    if sys.stderr is None:  # closed by the caller, who wants no messages
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (it stays open)
    if sys.stdout is None:
        sys.exit(_one_line("yoso", "standard output is closed"))
    for stream in (sys.stdout, sys.stderr):  # where the locale has no such letter, a question mark stands for it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            app(prog_name="yoso")
        finally:
            sys.stdout.flush()
    except OSError as problem:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing more is tried when Python ends
        status = problem.__context__.code if isinstance(problem.__context__, SystemExit) else 0
        if isinstance(problem, BrokenPipeError) or status:  # whoever read it has had enough, or the reason is said
            sys.exit(status or 1)
        sys.exit(_one_line("yoso", f"standard output cannot be written: {problem.strerror}"))


def _one_line(who: str, message: str) -> int:
    """Say what is wrong on stderr; the exit status for it."""
    typer.echo(f"{who}: {' '.join(message.split())}", err=True)
    return 2


@contextmanager
def _one_line_errors(context: typer.Context) -> Iterator[None]:
    """Wrong input ends in one line on stderr that names the option, and exit status 2.

    The library's errors begin with the name of an argument, and may name another as ``name=``; an
    option of that name is said as it is typed.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # torch's way to say MemoryError
            raise
        message = str(error) or "there is not enough memory"
        for parameter in context.command.params:
            option = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
            message = re.sub(rf"^{parameter.name}: ", f"{option}: ", message)
            message = re.sub(rf"\b{parameter.name}=", f"{option} ", message).rstrip()
        raise typer.Exit(_one_line(context.command_path, message)) from None


def _console() -> "Console":
    """Text is fitted to the width of a terminal, and left wide in a file or a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)


def _check_picture(name: str, path: Path | None) -> None:
    """Before a long run, not after it: a picture can be written there."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{name}: a picture needs matplotlib: pip install 'yoso-core[plots]'")
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"{name}: need a file name such as {path.stem or 'picture'}.png, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{name}: the folder {path.parent} does not exist")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{name}: {path} cannot be written")


@app.command()
def info(
    context: typer.Context,
    dim: Annotated[int, typer.Option(help="d: the vectors' dimension.")] = 64,
    num_hash: NumHash = 32,
    hash_code_len: HashCodeLen = 8,
    json_output: Json = False,
) -> None:
    """What runs here and why not, the machine, and the layout of a hash of the given sizes."""
    with _one_line_errors(context):
        found: dict[str, Any] = {
            "environment": _environment(),
            "backends": _backends(),
            "operations": _operations(),
            "hash": _hash_layout(dim, num_hash, hash_code_len),
        }
    if json_output:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print_info(**found)


def _environment() -> dict[str, Any]:
    from yoso_core.comparison import environment

    found = environment()
    packages = ("numba", "torch", "transformers", "matplotlib")
    found["versions"] |= {name: metadata.version(name) if importlib.util.find_spec(name) else None for name in packages}
    if found["versions"]["numba"]:
        from yoso_core.cpu.threads import default_threads

        found["numba_threads"] = default_threads()
    from yoso_core.backends import gpu_report

    found["gpu"] = gpu_report()
    return found


def _backends() -> list[dict[str, Any]]:
    from yoso_core.backends import BACKENDS, missing

    return [{"name": backend.name, "about": backend.about, "reason": missing(backend.name)} for backend in BACKENDS.values()]


def _operations() -> list[dict[str, Any]]:
    from yoso_core.operations import OPERATIONS
    from yoso_core.registry import automatic, variants

    rows = []
    for op in OPERATIONS:
        listed = variants(op)
        chosen = {choice.name for device in ("cpu", "cuda") if (choice := automatic(op, device))}
        for variant in listed:
            fields = ("op", "name", "available", "reason", "summary", "deterministic", "definition")
            rows.append({name: getattr(variant, name) for name in fields} | {"automatic": variant.name in chosen})
    return rows


def _hash_layout(dim: int, num_hash: int, hash_code_len: int) -> dict[str, Any]:
    from math import prod

    from yoso_core import checks
    from yoso_core.reference.hashing import WARM_UP, signs_shape

    checks.integer("dim", dim, 1)
    checks.hash_numbers(num_hash, hash_code_len)
    numbers = num_hash, hash_code_len, dim
    rounds, padded_dim = signs_shape(*numbers, "chained")
    return {
        "dim": dim,
        "num_hash": num_hash,
        "hash_code_len": hash_code_len,
        "padded_dim": padded_dim,
        "rotations": rounds - WARM_UP,
        "rounds": rounds,
        "rounds_of_the_paper": prod(signs_shape(*numbers, "paper")[:-1]),
        "table_bytes": 4 * dim << hash_code_len,
        "tables_bytes": 4 * num_hash * dim << hash_code_len,
    }


def _print_info(
    environment: dict[str, Any], backends: list[dict[str, Any]], operations: list[dict[str, Any]], hash: dict[str, Any]
) -> None:
    from rich.table import Table

    console = _console()
    console.print(", ".join(f"{name} {version or 'not installed'}" for name, version in environment["versions"].items()))
    threads = f", {environment['numba_threads']} Numba threads" if "numba_threads" in environment else ""
    console.print(f"{environment['processor']}, {environment['cores']} cores{threads}; {environment['system']}")
    console.print("; ".join(f"{name}: {what}" for name, what in environment["gpu"].items()) + "\n")

    about = Table("where", "here", "what it is", title="Where kernels run", title_justify="left")
    for backend in backends:
        about.add_row(backend["name"], "yes" if backend["reason"] is None else f"no: {backend['reason']}", backend["about"])
    console.print(about)

    title = "Variants (* chosen when none is named, by device; = the definition)"
    table = Table("operation", "variant", "here", "what it does", title=title, title_justify="left")
    op = None
    for row in operations:
        if op not in (None, row["op"]):
            table.add_section()
        marks = "*" * row["automatic"] + "=" * row["definition"]
        table.add_row(
            row["op"] if row["op"] != op else "",
            f"{row['name']} {marks}",
            "yes" if row["available"] else "no",
            row["summary"],
            style=None if row["available"] else "dim",
        )
        op = row["op"]
    console.print(table)

    m, tau, dim, padded = hash["num_hash"], hash["hash_code_len"], hash["dim"], hash["padded_dim"]
    console.print(
        f"\nHash of dim {dim} with num_hash {m}, hash_code_len {tau}: D = {padded}, {hash['rotations']} rotations in a chain of "
        f"{hash['rounds']} rounds; {hash['rounds_of_the_paper']} rounds with layout='paper', which is biased"
    )
    table_bytes, tables_bytes = in_words(hash["table_bytes"]), in_words(hash["tables_bytes"])
    console.print(f"Tables of a head, all 2**{tau} buckets x {dim} float32: {table_bytes} for one hash, {tables_bytes} for all {m}")


@app.command()
def compare(
    context: typer.Context,
    op: Annotated[
        str, typer.Argument(metavar="OP", help="An operation, such as lsh_cumulation; `yoso info` lists them.", show_default=False)
    ],
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    heads: Annotated[int, typer.Option(help="Heads.")] = 2,
    n: Annotated[int, typer.Option("--n", help="Queries.")] = 256,
    n_key: Annotated[int | None, typer.Option(help="Keys.", show_default="as many as queries")] = None,
    dim: Annotated[int, typer.Option(help="d of query and key.")] = 64,
    value_dim: Annotated[int | None, typer.Option(help="d_v of value.", show_default="that of --dim")] = None,
    num_hash: NumHash = 32,
    hash_code_len: HashCodeLen = 8,
    oversample: Annotated[
        int | None, typer.Option(help="s: bits per hash code beyond tau.", show_default="2 for smooth_table, else 0")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16, float32, float64; with torch also bfloat16.")] = "float32",
    library: Annotated[str, typer.Option(help="Whose arrays go in: numpy or torch.")] = "numpy",
    masked: Annotated[bool, typer.Option("--masked", help="Mask about one of four queries and keys.")] = False,
    seed: Seed = 0,
    emulate: Annotated[bool, typer.Option("--emulate", help="The CUDA kernels too, run on the CPU: slow, and no GPU's times.")] = False,
    variants: Annotated[str | None, typer.Option(help="Only these, separated by commas.", show_default="all")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE.py:NAME", help="A kernel of your own: a function, or a CudaVariant. Repeatable.", show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each variant, after one that does not count.")] = 5,
    json_output: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of errors and times to this file.", show_default=False)] = None,
) -> None:
    """Run every variant of an operation on the same input, kernels of your own among them: errors,
    repeatability, time.

    Exit status 1 if a variant fails, disagrees with the definition, or does not repeat the bits
    that it promises to; if one that --variants names cannot run on this machine; and if nothing
    could be compared.
    """
    from yoso_core import comparison, inputs, registry

    with _one_line_errors(context):
        _check_picture("plot", plot)
        args, kwargs = inputs.example_inputs(
            op,
            batch=batch,
            heads=heads,
            n=n,
            n_key=n_key,
            dim=dim,
            value_dim=value_dim,
            num_hash=num_hash,
            hash_code_len=hash_code_len,
            oversample=oversample,
            dtype=dtype,
            masked=masked,
            seed=seed,
            library=library,  # type: ignore[arg-type]  # example_inputs refuses a wrong name
        )
        progress = not json_output and sys.stderr.isatty()
        named = None if variants is None else [name.strip() for name in variants.split(",")]
        found = comparison.compare(
            op,
            *args,
            repeats=repeats,
            variants=named,
            also=_own_kernels(also or []),
            emulate=emulate,
            progress=progress,
            **kwargs,
        )
        if plot is not None:
            found.plot(plot)
    if json_output:
        typer.echo(found.to_json())
    else:
        console = _console()
        console.print(found.table(console.width))
        for note in found.notes:
            console.print(note)
    absent = [variant.name for variant in registry.variants(op) if not variant.available]
    if not found.agrees or set(absent) & set(named or ()) or all(row.verdict == "cannot run" for row in found.rows):
        raise typer.Exit(1)


def _own_kernels(wanted: list[str]) -> dict[str, Any]:
    """The objects that ``--also FILE.py:NAME`` names, by NAME."""
    found: dict[str, Any] = {}
    for one in wanted:
        file, _, name = one.rpartition(":")
        path = Path(file)
        if not file or not name.isidentifier():
            raise ValueError(f"also: need FILE.py:NAME, got {one!r}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise ValueError(f"also: {path} is not a Python file that can be read")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the reader's own code: whatever it raises
            raise ValueError(f"also: {path} cannot be imported: {type(error).__name__}: {error}") from error
        if not hasattr(module, name):
            raise ValueError(f"also: {path} has no {name!r}")
        if name in found:
            raise ValueError(f"also: {name!r} stands twice")
        found[name] = getattr(module, name)
    return found


@app.command()
def kernel(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="A kernel, such as shared_table, or a variant, such as cupy:shared_table.", show_default="list all"
        ),
    ] = None,
) -> None:
    """Print the source of a CUDA kernel with the note that explains it; without a name, list
    them.
    """
    from yoso_core.gpu.catalog import catalog
    from yoso_core.registry import KERNELS

    texts = catalog()
    language = {"cupy": "CUDA C++", "emulated": "CUDA C++", "numba_cuda": "Numba CUDA", "stepped": "Numba CUDA"}
    users: dict[tuple[str, str], list[str]] = {}
    for row in KERNELS:
        if row.where in ("cupy", "numba_cuda"):
            for used in row.kernels:
                users.setdefault((language[row.where], used), []).append(f"{row.op} {row.name}")
    with _one_line_errors(context):
        if name is None:
            for text in texts:
                typer.echo(f"{text.name:28}{text.language:12}{text.file:18}{', '.join(users.get((text.language, text.name), []))}")
            return
        of_variant = {(language[row.where], used) for row in KERNELS if row.name == name for used in row.kernels}
        wanted = [text for text in texts if text.name == name or (text.language, text.name) in of_variant]
        if not wanted:
            raise ValueError(f"name: no kernel or CUDA variant {name!r}; `yoso kernel` lists them")
    for text in wanted:
        used_by = ", ".join(users.get((text.language, text.name), []))
        typer.echo(f"{text.language}, {text.file} line {text.line}; used by {used_by}\n\n{text.text}\n")


@app.command()
def demo(
    context: typer.Context,
    text: Annotated[Path | None, typer.Option(help="A text file.", show_default="English prose that comes with Python")] = None,
    output: Annotated[Path, typer.Option(help="The picture to write.")] = Path("yoso_demo.png"),
    seed: Seed = 0,
    training: Annotated[
        bool, typer.Option("--training/--no-training", help="Train a small masked language model on the text too; needs PyTorch.")
    ] = True,
    budget: Annotated[float, typer.Option(help="About how many seconds it may take; most of what is over goes to the training.")] = 60.0,
    json_output: Json = False,
) -> None:
    """Self-attention over a real text: softmax, the exact expectation, and sampling, side by side;
    and a model that learns the text.

    Exit status 1 if a variant disagrees with the definition.
    """
    with _one_line_errors(context):
        _check_picture("output", output)
        from yoso_core import demo as job

        result = job.run(text=text, output=output, seed=seed, training=training, show=not json_output, budget=budget)
    if json_output:
        typer.echo(json.dumps(result.to_dict(), indent=2, allow_nan=False))
    if not result.agrees:
        raise typer.Exit(1)


@app.command("fill-mask")
def fill_mask(
    context: typer.Context,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A text with [MASK] where a word is to be guessed.", show_default=False)],
    path_or_name: Annotated[
        str, typer.Option("--model", help="A folder with a YOSO masked LM and its tokenizer, or its name on the hub.", show_default=False)
    ],
    sampled: Annotated[bool, typer.Option("--sampled", help="Sample the attention instead of taking its expectation.")] = False,
    top: Annotated[int, typer.Option(help="Proposals for every mask.")] = 5,
    num_hash: Annotated[int | None, typer.Option(help="m: hashes per vector, with --sampled.", show_default="the model's")] = None,
    hash_code_len: Annotated[int | None, typer.Option(help="tau: bits per hash code, 1 to 30.", show_default="the model's")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the hashes, with --sampled.", show_default="the model's")] = None,
    json_output: Json = False,
) -> None:
    """Guess the masked words of a text with a YOSO model: score, token and the text with it.

    Several masks are filled one by one, each with the others in place.
    """
    with _one_line_errors(context):
        for name, value in (("num_hash", num_hash), ("seed", seed)):
            if value is not None and not sampled:
                raise ValueError(f"{name}: the expectation has no hashes; add --sampled")
        _progress_bars_on_terminals_alone()
        from yoso_core import checks
        from yoso_core.model import filling
        from yoso_core.model.tokenizer import load_tokenizer

        model, tokenizer = filling.load_masked_lm(path_or_name), load_tokenizer(path_or_name)
        config = model.config
        config.use_expectation = not sampled
        config.num_hash, config.hash_code_len = checks.hash_numbers(
            config.num_hash if num_hash is None else num_hash, config.hash_code_len if hash_code_len is None else hash_code_len
        )
        config.hash_seed = config.hash_seed if seed is None else checks.integer("seed", seed, 0)
        masks = filling.fill_mask(model, tokenizer, text, top=top)
    settings: dict[str, Any] = {"attention": "sampled" if sampled else "expectation", "hash_code_len": config.hash_code_len}
    if sampled:
        settings |= {"num_hash": config.num_hash, "hash_seed": config.hash_seed}
    if json_output:
        found = [[dataclasses.asdict(proposal) for proposal in mask] for mask in masks]
        typer.echo(json.dumps({"model": path_or_name, "text": text, **settings, "masks": found}, indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    said = ", ".join(f"{name} {value}" for name, value in settings.items())
    table = Table("score", "token", "token_str", "sequence")
    for i, mask in enumerate(masks):
        if i:
            table.add_section()
        for proposal in mask:
            table.add_row(f"{proposal.score:.4f}", str(proposal.token), repr(proposal.token_str), proposal.sequence)
    console = _console()
    console.print(f"{path_or_name}: {said}", soft_wrap=True)  # a path stays in one piece, however narrow the table is
    console.print(table)


def _progress_bars_on_terminals_alone() -> None:
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


@app.command()
def convert(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint file of the authors' code.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The folder to write, for from_pretrained.", show_default=False)],
    config: Annotated[
        Path | None, typer.Option(help="The config.json of the authors that belongs to it, or one of transformers.", show_default=False)
    ] = None,
    num_attention_heads: Annotated[int | None, typer.Option(help="Heads; no shape shows them.", show_default="from --config")] = None,
    num_hash: Annotated[int | None, typer.Option(help="m: hashes per vector.", show_default="from --config, or 64")] = None,
    hash_code_len: Annotated[int | None, typer.Option(help="tau: bits per hash code.", show_default="from --config, or 9")] = None,
    first_position: Annotated[
        int | None, typer.Option(help="Row of the first token: 0 (the authors' BERT code) or 2 (RoBERTa).", show_default="by the file")
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="A key, or how keys begin, to leave out; repeatable.", show_default=False)] = None,
    path_or_name: Annotated[
        str | None, typer.Option("--tokenizer", help="A folder or a name on the hub, saved into the output.", show_default=False)
    ] = None,
    json_output: Json = False,
) -> None:
    """Make a folder for from_pretrained of a checkpoint in the layout of the authors' repository
    (mlpen/YOSO).

    A parameter that a YOSO model has no place for is an error that names it, unless --drop does.
    """
    import warnings

    with _one_line_errors(context):
        if output.exists() and not output.is_dir():
            raise ValueError(f"output: {output} is a file, need a folder")
        _progress_bars_on_terminals_alone()
        from yoso_core.model.original import convert_original_checkpoint
        from yoso_core.model.tokenizer import load_tokenizer

        given = {"num_attention_heads": num_attention_heads, "num_hash": num_hash, "hash_code_len": hash_code_len}
        settings = {name: value for name, value in given.items() if value is not None}
        tokenizer = None if path_or_name is None else load_tokenizer(path_or_name)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
            model = convert_original_checkpoint(path, config, first_position=first_position, drop=drop or (), **settings)
        with written_folder(output) as part:
            model.save_pretrained(part)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
    kind, parameters, fields = type(model).__name__, model.num_parameters(), model.config.to_dict()
    left_out = [str(note.message) for note in notes]
    if json_output:
        report = {"output": str(output), "model": kind, "parameters": parameters, "notes": left_out, "config": fields}
        typer.echo(json.dumps(report, indent=2))
        return
    shown = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size", "conv_window")
    typer.echo(f"{kind}, {parameters:,} parameters: {', '.join(f'{name} {fields[name]}' for name in shown)}")
    for note in left_out:
        typer.echo(f"note: {note}")
    typer.echo(f"written: {output}")


@app.command()
def plan(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="Your arrays: an .npz with query, key and value, and query_mask and key_mask if there are any, or an .npy for all three.",
            show_default="example inputs",
        ),
    ] = None,
    cosine: Annotated[float, typer.Option(help="The mean cosine wanted between a row and its expectation.")] = 0.95,
    hash_code_len: Annotated[list[int] | None, typer.Option(help="tau, part of what is computed; repeatable.", show_default="8")] = None,
    num_hash: Annotated[list[int] | None, typer.Option(help="m to choose from; repeatable.", show_default="4 to 256")] = None,
    oversample: Annotated[list[int] | None, typer.Option(help="s to choose from; repeatable.", show_default="0 to 4")] = None,
    seed: Seed = 0,
    json_output: Json = False,
) -> None:
    """How many hashes your vectors need: predicted cosine, error and time, and the cheapest choice.

    Exit status 1 if no choice reaches the cosine.
    """
    from yoso_core import planning

    with _one_line_errors(context):
        arrays = _arrays_of(file)
        given = {"hash_code_len": hash_code_len, "num_hash": num_hash, "oversample": oversample}
        found = planning.plan(**arrays, cosine=cosine, rng=seed, **{name: x for name, x in given.items() if x})
    if json_output:
        typer.echo(found.to_json())
    else:
        _print_plan(found)
    if found.best is None:
        raise typer.Exit(1)


def _arrays_of(file: Path | None) -> dict[str, Any]:
    """Query, key, value and masks by name."""
    import numpy as np

    if file is None:
        from yoso_core.inputs import example_inputs

        (query, key, value), _ = example_inputs("yoso_attention", n=1024)
        return {"query": query, "key": key, "value": value}
    try:
        loaded = np.load(file, allow_pickle=False)
    except ValueError as error:  # what NumPy says of a file that is none of its own speaks of pickles
        raise ValueError(f"file: {file} is not an .npy or .npz file of numbers") from error
    if isinstance(loaded, np.ndarray):
        return dict.fromkeys(("query", "key", "value"), loaded)
    with loaded:
        missing = [name for name in ("query", "key", "value") if name not in loaded]
        if missing:
            raise ValueError(f"file: {file} has no {', '.join(missing)}; it has {', '.join(loaded.files) or 'nothing'}")
        return {name: loaded[name] for name in ("query", "key", "value", "query_mask", "key_mask") if name in loaded}


def _print_plan(found: "Plan") -> None:
    from rich.table import Table

    table = Table(
        "tau", "s", "m", "cosine", "error", "time", title=f"The fewest hashes for a cosine of {found.cosine:g}", title_justify="left"
    )
    for choice in found.shortlist:
        table.add_row(
            str(choice.hash_code_len),
            str(choice.oversample),
            str(choice.num_hash),
            f"{choice.cosine:.3f} ± {choice.standard_error:.3f}" + ("" if choice.cosine >= found.cosine else ", too low"),
            f"{choice.error:.3f}",
            f"{1e3 * choice.seconds:.3g} ms",
        )
    console = _console()
    console.print(table)
    console.print(f"Predicted from {found.rows} rows; time by a count of additions, calibrated with three calls here.")
    best = found.best
    if best is None:
        console.print("No choice reaches it: ask for more hashes (--num-hash), or for less.")
    else:
        console.print(f"Take yoso_attention(query, key, value, {', '.join(f'{name}={x!r}' for name, x in best.options.items())})")


@app.command()
def tutorial(
    context: typer.Context,
    number: Annotated[int | None, typer.Argument(metavar="[N]", help="Which one to copy.", show_default="list all")] = None,
    folder: Annotated[Path, typer.Option(help="Where the copy goes.")] = Path("."),
    text: Annotated[bool, typer.Option("--text", help="The Python file with cells that the notebook is made of.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a copy that is there, answers and all.")] = False,
) -> None:
    """List the tutorials, or copy one to your folder to work in."""
    from yoso_core import tutorials

    if number is None:
        _print_tutorials()
        return
    with _one_line_errors(context):
        copied = tutorials.copy(number, folder, text=text, overwrite=overwrite)
    needed = [name for name in ("torch", "transformers", "matplotlib") if importlib.util.find_spec(name) is None]
    typer.echo(f"copied: {copied}")
    if needed:
        typer.echo(f"It may need {', '.join(needed)}: pip install 'yoso-core[tutorials]'")
    opened = "in your editor; its cells begin with # %%" if text else f"in your editor, or: pip install jupyterlab && jupyter lab {copied}"
    typer.echo(f"Open it {opened}")


def _print_tutorials() -> None:
    from rich.table import Column, Table

    from yoso_core.tutorials import tutorials

    table = Table("", Column("tutorial", no_wrap=True), "you will be able to", "time")
    for row in tutorials():
        table.add_row(str(row.number), row.title, row.promise, row.time)
    console = _console()
    console.print(table)
    console.print("yoso tutorial N copies number N to this folder")


@app.command()
def warmup(
    context: typer.Context,
    dim: Annotated[list[int] | None, typer.Option(help="Head dims; repeatable.", show_default="32, 64 and 128")] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, float64, float16 or bfloat16; repeatable.", show_default="the first two"),
    ] = None,
    emulate: Annotated[bool, typer.Option("--emulate", help="The CUDA kernels too, for the emulator.")] = False,
) -> None:
    """Compile every kernel for this processor ahead of the first call, for images and classrooms.

    Another user may read what is kept; NUMBA_CACHE_DIR and YOSO_CORE_CACHE name other folders.
    """
    with _one_line_errors(context):
        from yoso_core import warming

        dims, dtypes = dim or [32, 64, 128], dtype or ["float32", "float64"]
        found = [warming.warm_cpu(dims, dtypes, progress=sys.stderr.isatty())]
        if emulate:
            found.append(warming.warm_emulator(dims, dtypes, progress=sys.stderr.isatty()))
    for kept in found:
        typer.echo(f"{kept.what}: {kept.fresh} compiled, {kept.number - kept.fresh} there already")
        for folder, size in kept.folders.items():
            typer.echo(f"{in_words(size)} in {folder}")


@app.command()
def bench(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="SUITE", help="Which suite: cpu, gpu (needs an NVIDIA GPU), model, bias, error, or learning.")
    ] = "cpu",
    repeats: Annotated[int, typer.Option(help="Timed samples per side, in turns.")] = 7,
    output: Annotated[Path, typer.Option(help="The folder for the JSON and the picture.")] = Path("benchmarks/results"),
    quick: Annotated[bool, typer.Option("--quick", help="Small cases only: does the benchmark itself work?")] = False,
    filter: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Only the cases of cpu, gpu or model with this text in their names, to a file of their own."),
    ] = None,
    isa: Annotated[
        str | None, typer.Option(metavar="ISA", help="Limit both sides of cpu or model to these instructions: avx2 or avx512.")
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Of gpu, on a machine without one: what the compiler says that its kernels take.")
    ] = False,
) -> None:
    """Measure beside the peers; every repeat is kept as JSON, written after every case."""
    with _one_line_errors(context):
        if output.exists() and not output.is_dir():
            raise ValueError(f"output: {output} is a file, need a folder")
        if static:
            from yoso_core.benchmarks.static import run_static

            if name != "gpu":
                raise ValueError(f"static: the suite {name!r} has no kernels of a GPU; `yoso bench gpu --static` compiles them")
            typer.echo(f"written: {run_static(output)}")
            return
        from yoso_core.benchmarks.runner import RedComparison, run_suite

        try:
            path = run_suite(name, repeats=repeats, quick=quick, filter=filter, isa=isa, output=output, progress=sys.stdout.isatty())
        except RedComparison as red:
            typer.echo(str(red), err=True)
            raise typer.Exit(1) from red
    typer.echo(f"written: {path}")
