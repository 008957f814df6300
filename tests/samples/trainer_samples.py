"""A tiny Llama, a tokenizer and text made on the spot, and trainers that keep every loss, for the tests of training."""

import functools
import re
from pydoc_data.topics import topics

import datasets
import torch
import transformers
import trl
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, BATCH, LENGTH = 8, 4, 48


@functools.cache
def paragraphs():
    """Prose of the language reference, as `help()` shows it."""
    found = (re.sub(r"\s+", " ", part).strip() for name in sorted(topics) for part in topics[name].split("\n\n"))
    return [part for part in dict.fromkeys(found) if 200 < len(part) < 400][:64]


@functools.cache
def tokenizer():
    """Every byte, and a few pairs learned from the text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(paragraphs(), learn)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def llama():
    """Two layers whose weights are large enough for adapters to lower the loss, which the usual 0.02 is not."""
    torch.manual_seed(0)
    words = tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def adapted(p=0.0):
    """With the scaling no power of two, which would hide where it is multiplied."""
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=13, lora_dropout=p, target_modules=LINEARS, task_type="CAUSAL_LM")
    return get_peft_model(llama(), config)


class Recording:
    """Keeps the loss of every micro-batch, unrounded, in the order they were computed."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", ()), loss.item()]
        return loss


class RecordingTrainer(Recording, transformers.Trainer):
    pass


class RecordingSFTTrainer(Recording, trl.SFTTrainer):
    pass


def options(folder, **changes):
    return dict(
        output_dir=str(folder), per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=1e-2, seed=3,
        lr_scheduler_type="constant", use_cpu=True, bf16=False, logging_strategy="no", save_strategy="no",
        report_to=[], disable_tqdm=True,
    ) | changes  # fmt: skip


def by_transformers(model, folder, **changes):
    """`transformers.Trainer` on blocks of the text."""
    ids = tokenizer()("\n".join(paragraphs()))["input_ids"]
    blocks = [ids[i : i + LENGTH] for i in range(0, LENGTH * 64, LENGTH)]
    data = [{"input_ids": block, "labels": block} for block in blocks]
    return RecordingTrainer(model, transformers.TrainingArguments(**options(folder, **changes)), train_dataset=data)


def by_trl(model, folder, **changes):
    """TRL's `SFTTrainer` on the text itself: it tokenizes, truncates, pads, and checkpoints activations by default."""
    data = datasets.Dataset.from_dict({"text": paragraphs()})
    arguments = trl.SFTConfig(**options(folder, **{"max_length": LENGTH, **changes}))
    return RecordingSFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer())


TRAINERS = {"transformers": by_transformers, "trl": by_trl}
