"""With any chat template, a model that has memorized its rows generates their responses and then
stops."""

import json
from dataclasses import replace

import pytest
from mlx_lm.generate import stream_generate
from transformers import AutoTokenizer

from lib import chat_templates
from lib.folders import write_llama
from mlx_segtrain import TrainConfig, load, train
from mlx_segtrain.adapters import prompting_of
from mlx_segtrain.adapters.merging import merge
from mlx_segtrain.data import Prompting
from mlx_segtrain.errors import InputError
from mlx_segtrain.serving.confined.parent import Confined
from mlx_segtrain.serving.generation.mounting import Selected, read_base, read_mounted

pytestmark = pytest.mark.acceptance

ANSWERS = {"a": "yes it is", "bb": "no", "what": "42 of them", "d": "end"}
STOPS = ["<|im_end|>", "</s>", "<|user|>", "<|eot|>"]
CLOSED = "\n</think>\n\n"
#: For each template: the run's template variables, and the text before each response.
KINDS = {
    "CHATML": ({}, ""),
    "OPEN": ({}, CLOSED),
    "SWITCHED": ({"enable_thinking": True}, CLOSED),
    "SWITCHED off": ({"enable_thinking": False}, ""),
    "NEXT_ROLE": ({}, "</think>"),
    "SYSTEM_LAST": ({}, ""),
    "TWO_STOPS": ({}, ""),
    "ALWAYS_HEADER": ({}, ""),
    "NO_STOP": ({}, ""),
    "PARTS": ({}, ""),
    "raw": ({}, ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_learned_by_heart_are_answered_and_the_answer_stops(kind, request, tmp_path):
    variables, before = KINDS[kind]
    # The model has only one layer, because it then memorizes the four rows in fewer steps.
    model = write_llama(tmp_path / "model", tied=False, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": [*STOPS[2:], "<|assistant|>"]})
    if kind != "raw":
        tokenizer.chat_template = getattr(chat_templates, kind.split()[0])
    tokenizer.save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    config["eos_token_id"] = tokenizer.convert_tokens_to_ids(STOPS)
    (model / "config.json").write_text(json.dumps(config))

    system = [{"role": "system", "content": "Be"}] if kind == "SYSTEM_LAST" else []
    rows = [
        {"prompt": question, "completion": answer}
        if kind == "raw"
        else {
            "messages": [
                *system,
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in ANSWERS.items()
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(
        TrainConfig(
            model_dir=model,
            data_dir=tmp_path,
            adapter_path=tmp_path / "adapter",
            iters=110,
            learning_rate=1e-2,
            lr_schedule="cosine",
            rank=16,
            rank_scaling="constant",
            scale=4.0,
            batch_size=4,
            max_seq_length=128,
            target_modules=["all-linear", "lm_head"],
            steps_per_save=0,
            steps_per_report=1,
            chat_template_kwargs=variables,
            prompt_format="raw" if kind == "raw" else "auto",
        ),
        on_step=lambda event: event["loss"] < 0.005,  # stops the run early
    )
    assert result.final_train_loss is not None and result.final_train_loss < 0.02

    trained, tokenizer = load(model, tmp_path / "adapter")
    prompting = prompting_of(tmp_path / "adapter")
    for question, answer in ANSWERS.items():
        prompt = prompting.ids(tokenizer, question, "Be" if system else None)
        parts = list(stream_generate(trained, tokenizer, prompt, max_tokens=40))
        assert "".join(part.text for part in parts) == before + answer
        assert parts[-1].finish_reason == "stop"

    # The server renders the same prompts.
    confined = Confined(model)
    request.addfinalizer(confined.close)
    base = read_base(model, confined)
    mounted = read_mounted("own", tmp_path / "adapter", base)
    if kind != "raw":
        chat = [*system, {"role": "user", "content": question}]
        assert Selected(base, (mounted,)).encode_chat(chat) == prompt
    if kind == "SWITCHED off":
        on = {"enable_thinking": True}
        assert Selected(base, (mounted,)).encode_chat(chat, on) != prompt
        other = replace(mounted, id="other", prompting=Prompting("chat", on))
        with pytest.raises(InputError, match=r"own\+other were trained with different values"):
            Selected(base, (mounted, other)).encode_chat(chat)
        assert Selected(base, (mounted, other)).encode_chat(chat, variables) == prompt
        merge([tmp_path / "adapter"] * 2, tmp_path / "merged")
        assert prompting_of(tmp_path / "merged") == prompting
