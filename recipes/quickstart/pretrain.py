"""Pretrains the quickstart's small Llama on the texts that every CPython installation carries."""

import argparse
import math
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import lightning
import torch
import transformers
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from maskpro_lightning.modules.python_docs import python_docs

FOLDER = Path(__file__).parent
END_OF_TEXT = "<|eos|>"
LENGTH = 128
PROMPT = "Return True if"


class Split(NamedTuple):
    """The sizes of one split of the texts and the finished model's loss on it."""

    texts: int
    bytes: int
    tokens: int
    loss: float

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of text."""
        return self.loss / math.log(2) * self.tokens / self.bytes


class Pretraining(lightning.LightningModule):
    """Next-token training of a causal language model, the held-out loss kept by step."""

    def __init__(
        self, model: LlamaForCausalLM, learning_rate: float, weight_decay: float, steps: int
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.steps = steps
        self.warm_up = max(1, steps // 20)
        self.held_out_losses: dict[int, float] = {}

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Returns the mean next-token loss of a batch in nats."""
        loss: Tensor = self.model(input_ids=batch[0], labels=batch[0], use_cache=False).loss
        return loss

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("held_out_loss", self.loss(batch), prog_bar=True, batch_size=len(batch[0]))

    def on_validation_epoch_end(self) -> None:
        loss = self.trainer.callback_metrics["held_out_loss"].item()
        self.held_out_losses[self.global_step] = loss
        self.print(f"\nstep {self.global_step}: held-out loss {loss:.4f}", flush=True)

    def learning_rate_factor(self, step: int) -> float:
        """Returns the share of the peak rate: a linear rise, then a cosine fall to zero."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        return 0.5 + 0.5 * math.cos(math.pi * (step - self.warm_up) / (self.steps - self.warm_up))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = AdamW(
            self.parameters(),
            lr=self.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=self.weight_decay,
        )
        schedule = LambdaLR(optimizer, self.learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns the untrained model; all its sizes are multiples of 16."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Returns the token ids of all texts in a row, an end-of-text token after each."""
    return torch.tensor(tokenizer("".join(text + END_OF_TEXT for text in texts))["input_ids"])


def sequences(tokens: Tensor, stride: int) -> TensorDataset:
    """Returns sequences of `LENGTH` tokens that start every `stride` tokens."""
    return TensorDataset(tokens.unfold(0, LENGTH, stride))


def measure(module: Pretraining, texts: list[str], tokens: Tensor) -> Split:
    """Returns the sizes of a split and the model's loss on it."""
    blocks = sequences(tokens, LENGTH)
    with torch.inference_mode():
        losses = [module.loss(batch).item() * len(batch[0]) for batch in DataLoader(blocks, 64)]
    size = sum(len(text.encode()) for text in texts)
    return Split(len(texts), size, len(tokens), sum(losses) / len(blocks))


def greedy_sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns the most likely continuation of `PROMPT`, the prompt included."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=80)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def parse_arguments() -> argparse.Namespace:
    """Returns the command line's arguments; the defaults make the committed model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER / "model")
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--weight-decay", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Trains the tokenizer and the model, measures them and writes them with their card."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    lightning.seed_everything(args.seed)
    start = time.perf_counter()

    train_texts, held_out_texts = python_docs("train"), python_docs("validation")
    tokenizer = train_tokenizer(train_texts)
    train_tokens, held_out_tokens = pack(tokenizer, train_texts), pack(tokenizer, held_out_texts)
    model = new_model(tokenizer)
    module = Pretraining(model, args.learning_rate, args.weight_decay, args.steps)

    windows = sequences(train_tokens, stride=1)
    sampler = RandomSampler(windows, replacement=True, num_samples=args.steps * args.batch_size)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 10),
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(
        module,
        DataLoader(windows, args.batch_size, sampler=sampler),
        DataLoader(sequences(held_out_tokens, LENGTH), 64),
    )

    minutes = (time.perf_counter() - start) / 60

    module.eval()
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    history = module.held_out_losses.items()
    card = (
        (FOLDER / "model_card_template.md")
        .read_text(encoding="utf-8")
        .format(
            config=model.config,
            parameters=model.num_parameters(),
            args=args,
            warm_up=module.warm_up,
            length=LENGTH,
            passes=args.steps * args.batch_size * LENGTH / len(train_tokens),
            minutes=minutes,
            train=measure(module, train_texts, train_tokens),
            held_out=measure(module, held_out_texts, held_out_tokens),
            history="\n".join(f"| {step:,} | {loss:.4f} |" for step, loss in history),
            sample=greedy_sample(model, tokenizer),
            end_of_text=END_OF_TEXT,
            command=shlex.join(["python", *sys.argv]),
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
        )
    )
    (args.output / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
