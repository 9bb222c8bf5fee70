"""The model card of an exported run: everything in it is read from the run, the model folder and the corpus."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pager.models import EmoForCausalLM
from training.data import PackedRows
from training.evaluate import EVALUATION_POOL, LossTable
from training.recipe import PoolMode, Recipe
from training.run_folder import Progress

PROMPTS = (
    "def __init__(self, nodes):\n        self.nodes = nodes\n\n    def add_edge(self,",
    "(a) The Mayor shall",
    "O gentle night, that o'er the weary world\nDoth spread thy",
)
WHAT: dict[PoolMode, str] = {
    "document": "An EMO mixture-of-experts model (arXiv 2605.06663): in training every document was kept to a pool of "
    "experts drawn anew for it, so that a few experts chosen from a prompt serve what follows.",
    "none": "A standard mixture-of-experts model, trained without document pools: the control of an EMO model of the "
    "same shape, data, order and tokens.",
}


def write_card(run: Path, to: Path, losses: LossTable, corpus: Path | None) -> None:
    """Writes `to/README.md`.

    Without a corpus whose README has a table of sources, the card says that none was given.
    """
    recipe = Recipe.of(run)
    progress = Progress.of(run)
    model = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32).eval()
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\nlanguage: en\n---",
        f"# {to.name}",
        WHAT[recipe.pool],
        _shape(recipe, model, to),
        _use(to),
        "## Training",
        _training(recipe, progress, len(PackedRows.load(run / "rows.npz")) * recipe.train_context),
        "## Loss",
        _losses(losses),
        "## Samples",
        _samples(model, to),
        "## Intended use",
        "Running, testing and measuring expert paging and pools on a real checkpoint that any machine can hold: demo, "
        "tests, benchmarks and `docs/evidence.md` of this project. For nothing else.",
        "## Limits",
        "- Small, and trained on little text: the loss was still falling. Facts are invented; names of people and "
        "projects in the data appear.\n"
        "- English and source code of the domains below only. No instruction tuning, no safety tuning.\n"
        "- Losses of different domains are not comparable: tokens and documents differ in length and predictability.\n"
        "- What holds for pools of this model need not hold for larger ones; measure with `expert-pager eval`.",
        "## Data",
        "The text is not part of this project. Its sources and their licences:",
        licence_table(corpus) or "The corpus came without a table of sources.",
    ]
    (to / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def licence_table(corpus: Path | None) -> str | None:
    """Returns domain, source and licence from the first table of the corpus' README that has these columns."""
    path = None if corpus is None else corpus / "README.md"
    if path is None or not path.is_file():
        return None
    wanted: list[int] = []
    rows: list[list[str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.lstrip().startswith("|") else []
        if not wanted:
            names = [cell.partition("(")[0].strip().lower() for cell in cells]
            wanted = [names.index(name) for name in ("domain", "source", "licence") if name in names]
            wanted = wanted if len(wanted) == 3 else []
        elif len(cells) <= max(wanted):
            break
        elif set(cells[0]) - set("-: "):
            rows.append([cells[column] for column in wanted])
    if not rows:
        return None
    lines = [["domain", "source", "licence"], ["---"] * 3, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shape(recipe: Recipe, model: EmoForCausalLM, to: Path) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    expert = 3 * recipe.hidden_size * recipe.intermediate_size
    routed = recipe.num_experts - recipe.num_shared
    weights = (to / "model.safetensors").stat().st_size
    rows = [
        ("parameters", f"{parameters / 1e6:.1f} M"),
        ("layers / hidden / heads", f"{recipe.num_layers} / {recipe.hidden_size} / {recipe.num_heads} (no GQA)"),
        (
            "experts a layer",
            f"{recipe.num_experts}: {routed} routed and {recipe.num_shared} shared (the last); top-{recipe.top_k} = "
            f"{recipe.top_k - recipe.num_shared} routed and the shared",
        ),
        (
            "expert",
            f"SwiGLU, intermediate {recipe.intermediate_size}: {expert:,} parameters, {2 * expert:,} bytes in bf16",
        ),
        ("context", f"{recipe.context} (trained on rows of {recipe.train_context})"),
        ("tokenizer", f"byte-level BPE of {recipe.vocab_size} tokens, trained on the same text; eos 0, pad 1, no bos"),
        ("format", f"bf16 safetensors with EMO's released tensor names; {weights / 1e6:.1f} MB"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _use(to: Path) -> str:
    return (
        "```python\nimport pager.models  # registers the native EMO; no remote code\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("models/{to.name}")\n```'
    )


def _training(recipe: Recipe, progress: Progress, epoch_tokens: int) -> str:
    largest = recipe.num_experts - recipe.num_shared
    pools = (
        f"Document pools of {recipe.min_pool} to {largest} routed experts, drawn per document and "
        "step, small ones as often as large ones (log-uniform). "
        if recipe.pool == "document"
        else "No document pools. "
    )
    return (
        f"{progress.step} steps of {recipe.rows_per_step * recipe.train_context} tokens: {progress.tokens / 1e6:.2f} M "
        f"tokens, {progress.tokens / epoch_tokens:.2f} epochs, equal numbers of tokens from every domain; "
        f"{progress.elapsed_s / 60:.0f} minutes. {pools}Load balancing over the whole batch "
        f"({recipe.balance_weight:g}), router z-loss ({recipe.z_weight:g}), gate in fp32. AdamW with weight decay "
        f"{recipe.weight_decay:g} at {recipe.learning_rate:g} after {recipe.warmup_steps} steps, decaying linearly to "
        f"zero; gradients clipped at {recipe.clip_norm:g}; seed {recipe.seed}. `make train` repeats it, and "
        "`training/README.md` says how."
    )


def _losses(losses: LossTable) -> str:
    pool = f"pool{EVALUATION_POOL}"
    rows = [f"| {domain} | {row['full']:.3f} | {row[pool]:.3f} |" for domain, row in losses.items() if domain != "mean"]
    mean = losses["mean"]
    return "\n".join(
        [
            f"Validation loss in nats a token of the fp32 weights. `pool {EVALUATION_POOL}` keeps every document to "
            f"{EVALUATION_POOL} routed experts a layer, chosen over the whole document as in training.",
            "",
            f"| domain | all experts | pool {EVALUATION_POOL} |",
            "|---|---:|---:|",
            *rows,
            f"| **mean** | **{mean['full']:.3f}** | **{mean[pool]:.3f}** |",
        ]
    )


def _samples(model: EmoForCausalLM, to: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(to)
    context = model.config.max_position_embeddings
    shown = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=context // 2)
        torch.manual_seed(0)
        output = model.generate(
            **inputs, max_new_tokens=min(48, context // 2), do_sample=True, temperature=0.7, top_k=0
        )
        continued = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        shown.append(f"{prompt}|{continued}".replace("```", "'''"))
    joined = "\n\n".join(shown)
    return f"Temperature 0.7, the first draw, all experts. The prompt is before the bar.\n\n```\n{joined}\n```"
