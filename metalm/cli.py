"""`metalm <verb>`: every import of weight happens inside the verb, so that `metalm --help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from metalm.errors import MetalmError

app = typer.Typer(
    help="METALM: bidirectional encoders docked on a causal decoder, trained semi-causally.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Make, import and check webdataset shards.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Out = Annotated[Path, typer.Option(help="Where to write.")]
Shards = Annotated[str, typer.Option("--data", help="Shards: a folder, a tar, or a brace pattern; for infilling JSON Lines.")]
Model = Annotated[str, typer.Option(help="A run, an export, or a Hugging Face Hub id.")]
DRAFT = (
    "Guesses ahead, for the same greedy text (but for ties) sooner: a smaller run of the same tokenizer, or a number of layers."
)
COMPILE = "Have torch.compile make steps of decoding faster, after half a minute of compiling: for many or long answers."


@app.callback()
def launcher(local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0) -> None:
    # DeepSpeed's launcher passes --local_rank, and sets LOCAL_RANK, which is what is read.
    del local_rank


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and report.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the world and of training.")] = 0,
) -> None:
    """The whole job on the embedded data set: pretrain, zero-shot VQA, fine-tune for captioning, report."""
    from metalm.demo import run_demo

    run_demo(out, seed)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or a bundled one such as demo/pretrain.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example training.steps=100.")] = None,
) -> None:
    """Pretrain or fine-tune (init_from=RUN); the same command resumes a run that was stopped."""
    from metalm.training.config import load_run_config

    run_config = load_run_config(config, overrides or [])
    if run_config.dry_run:
        from metalm.training.estimate import print_estimate

        print_estimate(run_config)
        return
    from metalm.training.loop import train as run

    run(run_config)


@app.command()
def compare(
    config: Annotated[str, typer.Argument(help="A YAML file, or a bundled one such as compare/text.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example seeds=[0].")] = None,
) -> None:
    """Pretrain in several ways on the same text and judge all by the same yardsticks; the same command resumes."""
    from metalm.comparison.compare import compare as run
    from metalm.comparison.config import load_compare_config

    compare_config = load_compare_config(config, overrides or [])
    run(compare_config)
    print((Path(compare_config.out) / "comparison.md").read_text())
    print(Path(compare_config.out) / "comparison.html")


WRITTEN = {"blind", "beams", "length_penalty", "max_new_tokens", "dtype", "draft", "compile"}
SHOWN = WRITTEN | {"shots", "shots_data", "same_shots", "seed"}
ALWAYS_HEEDED = {"task", "model", "data", "out", "limit", "batch_size"}
HEEDED = {  # options of each evaluation
    "vqa": SHOWN,
    "captioning": SHOWN | {"spice"},
    "transcription": WRITTEN,
    "perplexity": {"dtype"},
    "classification": set(),
    "tagging": set(),
    "seq2seq": {"max_new_tokens"},
    "infilling": {"max_new_tokens", "ngram", "forward_only"},
}


@app.command()
def evaluate(
    context: typer.Context,
    task: Annotated[
        str, typer.Argument(help="vqa, captioning, transcription, perplexity, classification, tagging, seq2seq, infilling.")
    ],
    model: Model,
    data: Shards,
    out: Annotated[Path, typer.Option(help="The result, a JSON file.")],
    shots: Annotated[int, typer.Option(help="Worked examples before each query.")] = 0,
    shots_data: Annotated[str, typer.Option(help="Shards to draw them from; empty: --data itself.")] = "",
    same_shots: Annotated[
        bool, typer.Option("--same-shots", help="The same worked examples before all queries: sooner.")
    ] = False,
    blind: Annotated[bool, typer.Option("--blind", help="Blank every picture, or sound: the first thing to beat.")] = False,
    spice: Annotated[bool, typer.Option("--spice", help="Score captions by SPICE too.")] = False,
    beams: Annotated[int, typer.Option(help="Beam search with so many beams.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Beam scores are divided by length to this power.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time; results do not depend on it.")] = 64,
    ngram: Annotated[int, typer.Option(help="Infilling: tokens on which both sides must agree.")] = 4,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="Infilling: write from the prefix on alone.")] = False,
    limit: Annotated[int, typer.Option(help="Evaluate so many samples only; 0: all.")] = 0,
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16 (faster, rounding depends on the batch), int8 or int4 (weights rounded), w8a8."),
    ] = "float32",
    draft: Annotated[str, typer.Option(help=DRAFT)] = "",
    compile: Annotated[bool, typer.Option("--compile", help=COMPILE)] = False,
    seed: Annotated[int, typer.Option(help="Seed of the draw of worked examples.")] = 0,
) -> None:
    """Score a model on shards."""
    from metalm.errors import ConfigError
    from metalm.evaluation.captioning import evaluate_captioning
    from metalm.evaluation.page import write_page
    from metalm.evaluation.predictor import Predictor
    from metalm.evaluation.vqa import evaluate_vqa
    from metalm.inference.generate import GenerationConfig
    from metalm.registry import did_you_mean

    if task not in HEEDED:
        raise ConfigError(f"no evaluation is called {task!r}{did_you_mean(task, HEEDED)}")
    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
    for name in given:
        if name not in ALWAYS_HEEDED | HEEDED[task]:
            own = ", ".join(f"--{other.replace('_', '-')}" for other in sorted(HEEDED[task]))
            hint = f"; its options are {own}" if own else ""
            raise ConfigError(f"{task} has no use for --{name.replace('_', '-')}{hint}")
    if (same_shots or shots_data) and not shots:
        raise ConfigError("--same-shots and --shots-data say which worked examples are drawn: say how many by --shots")
    if task == "perplexity":
        from metalm.evaluation.perplexity import evaluate_perplexity

        report_result(evaluate_perplexity(model, data, batch_size=batch_size, limit=limit, dtype=dtype), out)
        return
    if task == "classification":
        from metalm.evaluation.classification import evaluate_classification

        report_result(evaluate_classification(model, data, batch_size, limit), out)
        return
    if task == "tagging":
        from metalm.evaluation.tagging import evaluate_tagging

        report_result(evaluate_tagging(model, data, batch_size, limit), out)
        return
    if task == "seq2seq":
        from metalm.evaluation.seq2seq import evaluate_seq2seq

        report_result(evaluate_seq2seq(model, data, max_new_tokens, batch_size, limit), out)
        return
    if task == "infilling":
        from metalm.evaluation.infilling import Infiller, evaluate_infilling
        from metalm.inference.infill import InfillConfig

        infiller = Infiller.load(model, InfillConfig(max_new_tokens, ngram, forward_only=forward_only), batch_size)
        report_result(evaluate_infilling(infiller, data, model, limit), out)
        return
    generation = GenerationConfig(max_new_tokens, beams, length_penalty=length_penalty)
    predictor = Predictor.load(model, generation, batch_size, dtype, draft=draft, compiled=compile)
    drawn = {"shots": shots, "shots_data": shots_data, "same_shots": same_shots, "seed": seed}
    if task == "transcription":
        from metalm.evaluation.transcription import evaluate_transcription

        result = evaluate_transcription(predictor, data, model, blind, limit)
    elif task == "vqa":
        result = evaluate_vqa(predictor, data, model, **drawn, blind=blind, limit=limit)
    else:
        result = evaluate_captioning(predictor, data, model, **drawn, blind=blind, spice=spice, limit=limit)
    result.config |= {"dtype": dtype, "batch_size": batch_size} | ({"draft": draft} if draft else {})
    result.config |= {"compile": True} if compile else {}
    report_result(result, out)
    if task != "transcription":
        print(write_page(result, out))


def report_result(result: Any, out: Path) -> None:
    """Writes a result and prints its figures."""
    lines = result.write(out)
    for name, value in result.metrics.items():
        print(f"{name:24s} {value:.4f}")
    print(out, lines, sep="\n")


@app.command()
def infill(
    model: Model,
    prefix: Annotated[str, typer.Option(help="The text before the hole.")] = "",
    suffix: Annotated[str, typer.Option(help="The text after it.")] = "",
    file: Annotated[Path | None, typer.Option(help='JSON Lines of {"prompt", "suffix"}, in place of one hole.')] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the filled rows; needed with --file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest text of either side, in tokens.")] = 64,
    ngram: Annotated[int, typer.Option(help="Tokens on which both sides must agree before they meet.")] = 4,
    threshold: Annotated[float, typer.Option(help="Accept tokens of this probability; 0: only the likeliest.")] = 0.0,
    predict_suffix: Annotated[bool, typer.Option("--predict-suffix", help="The suffix's first token too.")] = False,
    batch_size: Annotated[int, typer.Option(help="Holes of a --file at a time; results do not depend on it.")] = 64,
) -> None:
    """Fill the hole between a prefix and a suffix from both sides at once (a model trained as 'mim')."""
    import json

    from metalm.errors import ConfigError
    from metalm.evaluation.infilling import Infiller, read_holes
    from metalm.inference.infill import InfillConfig

    if file is None and not (prefix or suffix):
        raise ConfigError("give --prefix, --suffix or both, or a --file of them")
    if (file is None) != (out is None):
        raise ConfigError("--file and --out go together")
    infiller = Infiller.load(model, InfillConfig(max_new_tokens, ngram, threshold, predict_suffix), batch_size)
    if file is None:
        [(text, found)], _ = infiller([(prefix, suffix)])
        print(text)
        print(f"{found.ended} in {found.calls} calls for {len(found.tokens)} tokens", file=sys.stderr)
        return
    rows = read_holes(file)
    filled_rows, _ = infiller([(row["prompt"], row["suffix"]) for row in rows], "infilling")
    with open(out, "w") as lines:
        for row, (text, found) in zip(rows, filled_rows):
            filled = {"infilling": text, "ended": found.ended, "calls": found.calls, "tokens": len(found.tokens)}
            lines.write(json.dumps(row | filled, ensure_ascii=False) + "\n")
    print(out)


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """Write a model's decoder in Hugging Face's layout, as transformers loads it."""
    import torch

    from metalm.errors import ConfigError
    from metalm.interop.decoders import save_decoder
    from metalm.model import MetaLM
    from metalm.pretrained import load_pretrained

    source, tokenizer = load_pretrained(model, torch.float32)
    if not isinstance(source, MetaLM):
        raise ConfigError(f"{model} holds the model {source.config.type!r}, which has no decoder")
    family = save_decoder(source.decoder.state_dict(), source.config.decoder, out, tokenizer.start, tokenizer.end)
    tokenizer.save(out)
    print(f"{out}: the decoder as a {family}")


@app.command()
def push(
    model: Annotated[str, typer.Option(help="A run or an export.")],
    to: Annotated[str, typer.Option(help="user/name on the Hugging Face Hub; it is made where it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make it so that only its owners see it.")] = False,
    results: Annotated[
        list[Path] | None, typer.Option(help="A result of `evaluate` for the card; several in their order.")
    ] = None,
) -> None:
    """Upload an export to the Hugging Face Hub, with its model card."""
    from metalm.hub import push_export

    print(push_export(model, to, private, results or []))


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="A run, an export, a Hugging Face Hub id, or hf:NAME for a decoder alone.")],
    prompt: Annotated[str, typer.Option(help="What to go on from.")] = "",
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture that goes before the prompt; several in their order.")
    ] = None,
    audio: Annotated[Path | None, typer.Option(help="A sound that goes before the prompt.")] = None,
    video: Annotated[Path | None, typer.Option(help="A film that goes before the prompt.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Write the prompt as the tokenizer's chat template has it, for a chat-tuned decoder.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy, more is more random.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    beams: Annotated[int, typer.Option(help="Beam search with so many beams.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Beam scores are divided by length to this power.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    choice: Annotated[
        list[str] | None, typer.Option(help="Write nothing, and say how likely this answer is; several are compared.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, int8 or int4 (weights rounded), w8a8 (products).")] = "float32",
    draft: Annotated[str, typer.Option(help=DRAFT)] = "",
    compile: Annotated[bool, typer.Option("--compile", help=COMPILE)] = False,
    guesses: Annotated[int, typer.Option(help="Tokens that the draft guesses at a time.")] = 4,
) -> None:
    """Answer a prompt, about a picture, a sound or a film if there is one."""
    from metalm.data.chat import Turn
    from metalm.errors import ConfigError, DataError, about
    from metalm.evaluation.predictor import Predictor
    from metalm.inference.generate import GenerationConfig
    from metalm.pretrained import read_model_config
    from metalm.segments import Document

    given = [("image", path) for path in image or []] + [(k, p) for k, p in (("audio", audio), ("video", video)) if p]
    if not prompt and not given:
        raise ConfigError("give --prompt, or --image, --audio or --video, or both")
    for kind, path in given:
        if not path.is_file():
            raise DataError(f"no {kind} at {path}")
    if read_model_config(model).get("type") == "seq2seq":
        if given or chat or choice or draft or compile or beams > 1 or temperature or dtype != "float32":
            raise ConfigError(
                f"{model} turns text into text, greedily and in float32: give --prompt and --max-new-tokens alone"
            )
        from metalm.inference.write import write_texts
        from metalm.pretrained import load_pretrained

        print(write_texts(*load_pretrained(model), [prompt], max_new_tokens)[0])
        return
    if choice and (chat or draft or compile or beams > 1 or temperature):
        raise ConfigError(
            "--choice ranks answers to a plain prompt: leave out --chat, --draft, --compile, --beams and --temperature"
        )
    settings = GenerationConfig(max_new_tokens, beams, temperature, top_p, length_penalty, seed, guesses)
    predictor = Predictor.load(model, settings, dtype=dtype, draft=draft, compiled=compile)
    media = [(kind, path.read_bytes()) for kind, path in given]
    names = ", ".join(str(path) for _, path in given) or "prompt"
    with about(names):
        interface = predictor.interface
        segments = interface.chat([Turn("user", [*media, prompt])]) if chat else interface.prompt(media, prompt)
        document = Document(segments, names)
        if not choice:
            print(predictor([document])[0])
            return
        [scores] = predictor.rank([document], [choice])
    for score, answer in sorted(zip(scores, choice), reverse=True):
        print(f"{score:9.3f}  {answer}")


@data_app.command("scenes")
def data_scenes(
    out: Out,
    seed: Annotated[int, typer.Option(help="Everything is drawn from it.")] = 0,
    size: Annotated[int, typer.Option(help="Pretraining images, and texts.")] = 20_000,
) -> None:
    """The embedded world: pictures of coloured shapes, texts, and questions."""
    from metalm.data.scenes import write_scenes

    for name, count in write_scenes(out, seed, size).items():
        print(f"{out / name}: {count:,} samples")


@data_app.command(
    "import", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def data_import(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A data set, text, jsonl, or questions; --help lists them.")] = "--help",
    out: Annotated[Path | None, typer.Option(help="Where to write.")] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Fewer makes more shards, for more workers.")] = 512,
) -> None:
    """Shards from a data set's own files: NAME --out SHARDS, then the importer's options (NAME --help lists them)."""
    from metalm.data.importers import IMPORTERS, import_dataset
    from metalm.data.shards import write_shards
    from metalm.errors import ConfigError

    if name == "--help":
        print("metalm data import NAME --out SHARDS [--samples-per-shard N] [the importer's options, see NAME --help]\n")
        print("\n".join(f"  {key:14s} {importer.help}" for key, importer in IMPORTERS.items()))
        return
    if name in IMPORTERS and "--help" in context.args:
        print(describe_importer(name))
        return
    options = parse_options(context.args)
    if out is None:
        raise ConfigError("--out is missing: where to write the shards")
    index = write_shards(import_dataset(name, **options), out, samples_per_shard, source=name)
    print(f"{out}: {index['num_samples']:,} samples in {len(index['shards'])} shards")


def describe_importer(name: str) -> str:
    """An importer's options with their defaults, and its documentation."""
    import inspect

    from metalm.data.importers import IMPORTERS

    function = IMPORTERS[name].function
    lines = [f"metalm data import {name} --out SHARDS, with"]
    for parameter in inspect.signature(function).parameters.values():
        option = "--" + parameter.name.replace("_", "-")
        default = "required" if parameter.default is inspect.Parameter.empty else f"default: {parameter.default!r}"
        lines.append(f"  {option:24s} {default}")
    return "\n".join([*lines, "", inspect.getdoc(function) or ""])


def parse_options(arguments: list[str]) -> dict[str, str | bool]:
    """`--some-name value` and `--flag` as {"some_name": "value", "flag": True}."""
    from metalm.errors import ConfigError

    options: dict[str, str | bool] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r}: options are written --name value")
        name, _, value = word[2:].partition("=")
        if value:
            options[name.replace("-", "_")] = value
        else:
            options[name.replace("-", "_")] = rest.pop(0) if rest and not rest[0].startswith("--") else True
    return options


@data_app.command("check")
def data_check(
    shards: Annotated[str, typer.Argument(help="A folder, a tar, or a brace pattern.")],
    ranks: Annotated[int, typer.Option(help="Training processes that shall read them.")] = 1,
    workers: Annotated[int, typer.Option(help="Data workers of each process.")] = 1,
) -> None:
    """Counts, sizes, broken samples by key, and whether there are shards enough; exits with 1 on a problem."""
    from rich.console import Console

    from metalm.data.check import check_shards

    report = check_shards(shards, ranks, workers)
    Console().print(report.render())
    if not report.ok:
        raise typer.Exit(1)


@data_app.command("encode")
def data_encode(
    model: Annotated[str, typer.Option(help="A run, an export, a Hugging Face Hub id, or a run's .yaml.")],
    encoder: Annotated[str, typer.Option(help="Its encoder of images, sounds or films, by name.")],
    data: Shards,
    out: Out,
    dtype: Annotated[str, typer.Option(help="Computed and kept in bfloat16 (half the size), or in float32.")] = "bfloat16",
    drop_media: Annotated[bool, typer.Option("--drop-media", help="Keep the states alone, not what they are of.")] = False,
    batch_size: Annotated[int, typer.Option(help="Media that the encoder reads at a time.")] = 32,
    max_broken: Annotated[int, typer.Option(help="So many samples with broken media are left out before it stops.")] = 100,
) -> None:
    """Shards with the states that a frozen encoder makes of their media: training on them skips it. Goes on if stopped."""
    from metalm.encode import encode_shards

    index = encode_shards(model, encoder, data, out, dtype, drop_media, batch_size, max_broken)
    print(f"{out}: {index['num_samples']:,} samples in {len(index['shards'])} shards")


def main() -> None:
    """The console script: what the person can mend is said in a sentence, without a traceback."""
    try:
        app()
    except MetalmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
