"""Captioning metrics by pycocoevalcap, the Python 3 form of the official COCO caption evaluation.

    bleu_1 … bleu_4   n-gram precision with brevity penalty (Papineni et al. 2002), over the whole corpus
    meteor            aligned unigrams with stems, synonyms, and paraphrases (Denkowski and Lavie 2014, version 1.5)
    rouge_l           longest common subsequence (Lin 2004)
    cider             CIDEr-D: cosine of tf-idf n-grams (Vedantam et al. 2015); idf comes from the references given
    spice             scene graphs (Anderson et al. 2016), by option
    exact_match       share of predictions that equal one of their references

Every metric is times 100, as papers print them (a CIDEr of 82.2 is 0.822 in pycocoevalcap's scale). Captions are
lower-cased, tokenised by Stanford's PTB tokenizer, and freed of punctuation first, so exact_match ignores those.
CIDEr's idf is log(samples / samples with the n-gram): it is 0 for one sample alone, and scores of two data sets of
different size do not compare.

Needs Java for the tokenizer, METEOR, and SPICE. An empty prediction counts as a caption without words: it scores 0.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from zipfile import BadZipFile

from metalm.errors import ConfigError, DataError, MetalmError

NAMES = ("bleu", "meteor", "rouge_l", "cider")
_JAVA_HINT = (
    "captioning metrics need Java (8 or newer; SPICE: 8 or 11) on the PATH. "
    "Install it, for example `apt-get install default-jre-headless` or `conda install -c conda-forge openjdk`"
)


class MetricError(MetalmError):
    """A program or file that a metric needs is missing or fails."""


def caption_metrics(
    predictions: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    spice: bool = False,
    names: Sequence[str] = NAMES,
) -> tuple[dict[str, float], dict[Hashable, dict[str, float]]]:
    """Metrics of the whole corpus, and the same metrics by sample, all times 100.

    Args:
        predictions: one caption a sample id.
        references: the human captions of the same ids, at least one with a word in it.
        spice: also SPICE: slow, wants 8 GB, and pycocoevalcap downloads its models (0.4 GB) at the first use.
        names: which of "bleu", "meteor", "rouge_l", "cider"; exact_match always comes along.

    Returns:
        {"exact_match": …, "bleu_1": …, …} and {id: the same keys}. A corpus figure is not the mean of its samples'
        for BLEU and METEOR, which pool their counts over the corpus.

    Raises:
        ConfigError: an unknown name.
        DataError: no predictions, ids that differ, or a sample whose references hold no word.
        MetricError: Java or SPICE's models are missing, or one of their programs fails.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise ConfigError(f"unknown captioning metric {unknown[0]!r}: choose from {', '.join(NAMES)}")
    _check_ids(predictions, references)
    ids = list(predictions)
    predicted = {id_: [words] for id_, words in zip(ids, ptb_tokenize([predictions[id_] for id_ in ids]))}
    referred = dict(zip(ids, _tokenize_groups([references[id_] for id_ in ids])))
    if wordless := [id_ for id_ in ids if not any(referred[id_])]:
        raise DataError(f"sample {wordless[0]!r}: its references hold no word ({len(wordless)} such samples)")

    matches = [float(any(predicted[id_]) and predicted[id_][0] in referred[id_]) for id_ in ids]
    by_metric = {"exact_match": (sum(matches) / len(matches), matches)}
    for name in (*dict.fromkeys(names), *(["spice"] if spice else [])):
        by_metric |= _SCORERS[name](referred, predicted)
    corpus = {name: 100 * float(score) for name, (score, _) in by_metric.items()}
    samples = {id_: {name: 100 * float(scores[i]) for name, (_, scores) in by_metric.items()} for i, id_ in enumerate(ids)}
    return corpus, samples


def ptb_tokenize(captions: Sequence[str]) -> list[str]:
    """Lower-cased captions, tokens separated by a blank, without punctuation: what pycocoevalcap's PTBTokenizer gives.

    It runs the same program with the same options; but where the wrapper writes into site-packages, prints on the
    terminal, ignores failure, and shifts captions against their ids at unusual line breaks, this does not.

    Raises:
        MetricError: Java is missing or the tokenizer fails.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [_java(), "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = "".join(" ".join(caption.split()) + "\n" for caption in captions)
    done = subprocess.run(command, input=lines.encode("utf-8", "replace"), capture_output=True, check=False)
    tokenized = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if done.returncode or len(tokenized) != len(captions):
        raise MetricError(_failed("the PTB tokenizer", done.stderr))
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split(" ") if word and word not in dropped) for line in tokenized]


def _tokenize_groups(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Groups of captions, each tokenised, in one run of the tokenizer."""
    tokenized = iter(ptb_tokenize([caption for group in groups for caption in group]))
    return [[next(tokenized) for _ in group] for group in groups]


def _bleu(references: dict, predictions: dict) -> dict:
    from pycocoevalcap.bleu.bleu import Bleu

    corpus, samples = Bleu(4).compute_score(references, predictions, verbose=0)
    return {f"bleu_{n}": (corpus[n - 1], samples[n - 1]) for n in range(1, 5)}


def _rouge_l(references: dict, predictions: dict) -> dict:
    from pycocoevalcap.rouge.rouge import Rouge

    return {"rouge_l": Rouge().compute_score(references, predictions)}


def _cider(references: dict, predictions: dict) -> dict:
    from pycocoevalcap.cider.cider import Cider

    return {"cider": Cider().compute_score(references, predictions)}


def _meteor(references: dict, predictions: dict) -> dict:
    def one_field(captions: list[str]) -> list[str]:
        # "|||" separates the fields of METEOR's line protocol; the tokenizer splits it, but not inside a markup tag.
        return [caption.replace("|||", " ") for caption in captions]

    with _meteor_process() as meteor:
        try:
            scores = meteor.compute_score(
                {id_: one_field(captions) for id_, captions in references.items()},
                {id_: one_field(captions) for id_, captions in predictions.items()},
            )
        except (OSError, ValueError) as error:  # the program ended: a broken pipe, or an empty line for a number
            meteor.meteor_p.kill()
            raise MetricError(_failed("METEOR", meteor.meteor_p.stderr.read())) from error
    return {"meteor": scores}


@contextmanager
def _meteor_process() -> Iterator:
    """pycocoevalcap's Meteor; its Java program, with a 2 GB heap, has ended when the block is left."""
    from pycocoevalcap.meteor.meteor import Meteor

    _java()
    meteor = Meteor()
    try:
        yield meteor
    finally:
        if meteor.lock.locked():  # left so by an exception: Meteor's own clean-up would wait for it forever
            meteor.lock.release()
        process = meteor.meteor_p
        process.kill()
        process.communicate()


def _spice(references: dict, predictions: dict) -> dict:
    from pycocoevalcap.spice.spice import Spice

    _java()
    try:
        with redirect_stdout(StringIO()):
            scorer = Spice()
    except (OSError, BadZipFile) as error:
        raise MetricError(
            f"SPICE's models are not there and their download failed ({error}): run once with a network and write "
            "access to the installed package pycocoevalcap (it fetches nlp.stanford.edu/software/"
            "stanford-corenlp-full-2015-12-09.zip into its folder spice/lib), or leave SPICE out"
        ) from error
    # SPICE's graph parser returns samples in sorted order of ids, and wants ids that JSON can hold: number them.
    ids = list(predictions)
    try:
        corpus, samples = scorer.compute_score(
            {i: references[id_] for i, id_ in enumerate(ids)}, {i: predictions[id_] for i, id_ in enumerate(ids)}
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise MetricError(
            f"SPICE failed ({error}): it needs Java 8 or 11 (it does not run on 17), 8 GB of memory, and write access "
            "to the installed package pycocoevalcap; or leave SPICE out"
        ) from error
    return {"spice": (corpus, [sample["All"]["f"] for sample in samples])}


_SCORERS = {"bleu": _bleu, "meteor": _meteor, "rouge_l": _rouge_l, "cider": _cider, "spice": _spice}


def _check_ids(predictions: Mapping, references: Mapping) -> None:
    if not predictions:
        raise DataError("no captions to score: there are no predictions")
    if missing := [id_ for id_ in predictions if id_ not in references]:
        raise DataError(f"{len(missing)} of {len(predictions)} predictions have no references, first {missing[0]!r}")
    if missing := [id_ for id_ in references if id_ not in predictions]:
        raise DataError(f"{len(missing)} of {len(references)} samples have no prediction, first {missing[0]!r}")


def _java() -> str:
    if (java := shutil.which("java")) is None:
        raise MetricError(f"no `java` found: {_JAVA_HINT}")
    return java


def _failed(program: str, stderr: bytes) -> str:
    said = stderr.decode("utf-8", "replace").strip().splitlines()
    return f"{program} failed ({said[-1] if said else 'it said nothing'}): {_JAVA_HINT}"
