"""Runs the fastest other trainers on a GPU, for bench/step.py, bench/packing.py and bench/grpo.py.

The trainers read a snapshot that this module writes: random bfloat16 weights of a SHAPE. The GPU
machine must have the packages torch, transformers, peft, bitsandbytes, liger-kernel, unsloth,
unsloth_zoo and trl. Neither mlx_segtrain nor its tests import this module.
"""

# pyright: reportMissingImports=false

import atexit
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np


def snapshot(shape, peer):
    """Writes a folder with random weights of a shape and a word tokenizer, in the Hugging Face
    format."""
    if peer == "unsloth":
        import unsloth  # noqa: F401 - it patches the modules that are imported after it
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    place = Path(tempfile.mkdtemp(prefix="bench-peers-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    fields = {key: value for key, value in shape.items() if key != "model_type"}
    config = AutoConfig.for_model(shape["model_type"], **fields, torch_dtype="bfloat16")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 1000)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    ).save_pretrained(place)
    return place


def _lora(rank, scale, suffixes):
    from peft import LoraConfig

    alpha = int(rank * scale)
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=suffixes, task_type="CAUSAL_LM")


def liger(place, variant, lora, longest):
    """Returns a transformers model with Liger's kernels and a PEFT adapter. `variant` is nf4 or
    bf16; nf4-ckpt and bf16-ckpt use gradient checkpointing."""
    import torch
    from liger_kernel.transformers import AutoLigerKernelForCausalLM
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    kind, _, recompute = variant.partition("-")
    more = {}
    if kind == "nf4":
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoLigerKernelForCausalLM.from_pretrained(
        place, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": 0}, **more
    )
    if kind == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, _lora(*lora))
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def unsloth(place, variant, lora, longest):
    """Returns Unsloth's model with an nf4 base. `variant` is `keep` (recomputes nothing), `ckpt`
    (recomputes everything) or `offload` (Unsloth's own gradient checkpointing)."""
    import torch
    import unsloth

    rank, scale, suffixes = lora
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(place), max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=True
    )
    return unsloth.FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=int(rank * scale),
        target_modules=suffixes,
        use_gradient_checkpointing={"keep": False, "ckpt": True, "offload": "unsloth"}[variant],
    ).train()


PEERS = {"liger": liger, "unsloth": unsloth}


class Packed:
    """A run of TRL's SFTTrainer on packed rows that records the seconds and tokens of its steps.

    `rows` are (ids, weights) pairs. `model` is one of PEERS, or None for transformers in bfloat16
    with the PEFT adapter that TRL creates. `longest` is the number of tokens in a packed row.
    """

    def __init__(self, rows, place, longest, steps, lora, model=None):
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import SFTConfig, SFTTrainer

        times = self.times = []
        self.tokens, self.supervised = [], []

        class Clock(TrainerCallback):
            def on_step_begin(self, *_, **__):
                self.begun = time.perf_counter()

            def on_step_end(self, *_, **__):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - self.begun)

        labels = [np.where(weights != 0, ids, -100).tolist() for ids, weights in rows]
        data = Dataset.from_dict({"input_ids": [ids.tolist() for ids, _ in rows], "labels": labels})
        out = tempfile.mkdtemp(prefix="bench-trl-")
        atexit.register(shutil.rmtree, out, ignore_errors=True)
        config = SFTConfig(
            output_dir=out,
            packing=True,
            max_length=longest,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,  # Unsloth's default is 2
            max_steps=steps,
            learning_rate=1e-4,
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        own = model is None
        self.trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.bfloat16, attn_implementation="sdpa"
            )
            if own
            else model,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(place),
            peft_config=_lora(*lora) if own else None,
            callbacks=[Clock()],
        )
        collate = self.trainer.data_collator

        def counted(examples):
            batch = collate(examples)
            self.tokens.append(int((batch["input_ids"] >= 0).sum()))
            self.supervised.append(int((batch["labels"] != -100).sum()))
            return batch

        self.trainer.data_collator = counted

    def run(self):
        self.trainer.train()
        n = len(self.times)  # the data loader reads ahead, so only the first n count
        self.tokens, self.supervised = self.tokens[:n], self.supervised[:n]


class Groups:
    """A run of TRL's GRPOTrainer with transformers' generation. For each cycle, it records the
    seconds of the rollouts and of the update, and the peak memory of each in bytes.

    `prompts` are texts. Each prompt has `group` completions of exactly `tokens` tokens, because no
    token ends a completion. The update runs `at_once` sequences per forward and backward pass.
    """

    def __init__(self, place, prompts, group, tokens, at_once, cycles, lora, beta, model=None):
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        gpu = torch.cuda.is_available()
        found = self.found = []

        def peak():
            if not gpu:
                return 0
            torch.cuda.synchronize()
            most = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return most

        class Timed(GRPOTrainer):
            def _generate_and_score_completions(self, inputs):
                peak()
                begun = time.perf_counter()
                made = super()._generate_and_score_completions(inputs)
                most = peak()
                self.rollout = time.perf_counter() - begun, most, made["completion_mask"].sum()
                return made

        class Clock(TrainerCallback):
            def on_step_begin(self, *_, **__):
                self.begun = time.perf_counter()

            def on_step_end(self, *_, **__):
                most = peak()
                whole = time.perf_counter() - self.begun
                rollout, highest, made = trainer.rollout
                found.append((rollout, whole - rollout, highest, most, int(made)))

        out = tempfile.mkdtemp(prefix="bench-trl-")
        atexit.register(shutil.rmtree, out, ignore_errors=True)
        count = len(prompts) * group
        config = GRPOConfig(
            output_dir=out,
            num_generations=group,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=count // at_once,
            max_completion_length=tokens,
            generation_kwargs={"min_new_tokens": tokens},
            temperature=1.0,
            beta=beta,
            loss_type="grpo",
            max_steps=cycles,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            bf16=gpu,
            use_cpu=not gpu,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        own = model is None
        self.trainer = trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.bfloat16 if gpu else torch.float32, attn_implementation="sdpa"
            )
            if own
            else model,
            reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
            args=config,
            train_dataset=Dataset.from_dict({"prompt": list(prompts) * cycles}),
            processing_class=AutoTokenizer.from_pretrained(place),
            peft_config=_lora(*lora) if own else None,
            callbacks=[Clock()],
        )

    def run(self):
        self.trainer.train()
        return self.found
