"""Chats as data sets keep them (tools, parts, other speakers' names, preferences): read right, or one sentence."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import pytorch_influence_functions as ptif
from tests.hf.tiny import CHAT, gradient, llama, own_loss, products, texts, tokenizer
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")

NAMED_TOOLS = (
    "{% if tools %}{{ '<system> ' }}{% for t in tools %}{{ t['function']['name'] + ' ' }}"
    "{% for p in t['function']['parameters'] %}{{ p + ' ' }}{% endfor %}{% endfor %}{{ '<eos> ' }}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% if m.tool_calls is defined %}"
    "{{ m.tool_calls[0]['function']['name'] }}{% else %}{{ m['content'] }}{% endif %}{{ ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
READS_PARTS = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] + ' and ' }}{% endfor %}{% endif %}{{ ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
PRINTS_CONTENT = CHAT.replace("m['content'] + ' <eos> '", "m['content'] }}{{ ' <eos> '")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(name: str, *parameters: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": dict.fromkeys(parameters, "a")}}


def written(words: Any, problem: Any, index: int = 0) -> tuple[str, str]:
    """A text of the data, and what is taught of it."""
    item = problem.data.dataset[index]
    return words.decode(item["input_ids"]).strip(), words.decode(item["labels"][item["labels"] != -100]).strip()


def scores(problem: Any, queries: Any) -> Any:
    return ptif.attribute(problem, queries=queries, method="grad_dot").values.double()


def test_tools_beside_a_chat_are_told_to_the_template() -> None:
    model, words = llama(), tokenizer(NAMED_TOOLS)
    chat, short = [user("who wrote"), assistant("this book")], [user("who"), assistant("cat")]
    rows = [{"messages": chat, "tools": [tool("sea", "moon")]}, {"messages": short, "tools": [tool("house", "year")]}]
    problem = ptif.hf.problem(model, words, datasets.Dataset.from_list(rows))  # Arrow fills in what others have
    assert written(words, problem)[0] == "<system> sea moon <eos> <user> who wrote <eos> <assistant> this book <eos>"
    assert written(words, problem, 1) == (
        "<system> house year <eos> <user> who <eos> <assistant> cat <eos>",
        "cat <eos>",
    )

    def ids(text: str, taught: int) -> Any:
        numbers = words(text)["input_ids"]
        return gradient(model, own_loss(model, numbers, [-100] * (len(numbers) - taught) + numbers[-taught:]))

    training = [ids(written(words, problem, i)[0], taught) for i, taught in enumerate((3, 2))]
    asked = ids("<system> sea <eos> <user> who <eos> <assistant> the moon <eos>", 3)
    row = {"prompt": [user("who")], "completion": "the moon", "tools": json.dumps([tool("sea")])}
    assert gap(scores(problem, row), products(model, [asked], training)) < 1e-6
    query = ptif.hf.query(model, words, [user("who")], "the moon", tools=[tool("sea")])
    assert gap(scores(problem, query), products(model, [asked], training)) < 1e-6
    with pytest.raises(ptif.errors.InvalidInput, match=r"tools= is told to a chat template, and a prompt is a text"):
        ptif.hf.query(model, words, "who", "the moon", tools=[tool("sea")])
    with pytest.raises(ptif.errors.InvalidInput, match=r"column 'tools' beside a chat holds a text that is no JSON"):
        ptif.hf.problem(model, words, [{"messages": chat, "tools": "sea"}])


@pytest.mark.parametrize("template", [CHAT, PRINTS_CONTENT, READS_PARTS])
def test_contents_in_parts_are_written_as_the_template_writes_them(template: str) -> None:
    words = tokenizer(template)
    parts = [{"type": "text", "text": "who "}, {"type": "text", "text": "wrote"}]
    problem = ptif.hf.problem(llama(), words, [[user(parts), assistant("this book")]])
    given = "who and wrote and" if template is READS_PARTS else "who wrote"
    assert written(words, problem) == (f"<user> {given} <eos> <assistant> this book <eos>", "this book <eos>")
    turns = problem.data.dataset.token_text(0).turns
    assert [role for _, role in turns] == ["user", "assistant"]
    with pytest.raises(ptif.errors.InvalidInput, match=r"a part of the type image; only texts can be read"):
        ptif.hf.problem(llama(), words, [[user([{"type": "image"}]), assistant("this book")]])


def test_an_answer_that_calls_a_tool_has_no_content() -> None:
    call = [{"type": "function", "function": {"name": "sea", "arguments": {}}}]
    rows = [{"messages": [user("who"), assistant(None, tool_calls=call), assistant("this book")]}]
    for template, answer in ((NAMED_TOOLS, "sea <eos> this book <eos>"), (CHAT, "<eos> this book <eos>"),
                             (PRINTS_CONTENT, "<eos> this book <eos>")):  # fmt: skip
        words = tokenizer(template)
        for data in (rows, datasets.Dataset.from_list(rows)):
            assert written(words, ptif.hf.problem(llama(), words, data))[1] == answer


def test_speakers_of_other_names_are_translated() -> None:
    words = tokenizer()
    shared = [{"from": "system", "value": "one"}, {"from": "human", "value": "who"}, {"from": "gpt", "value": "cat"}]
    problem = ptif.hf.problem(llama(), words, [{"conversations": shared}] * 2)
    assert written(words, problem) == ("<system> one <eos> <user> who <eos> <assistant> cat <eos>", "cat <eos>")
    usual = [{"role": "system", "content": "one"}, user("who"), assistant("cat")]
    assert gap(scores(problem, [shared]), scores(problem, [usual])) < 1e-7
    frame = pytest.importorskip("pandas").DataFrame({"conversations": [shared] * 2})
    assert written(words, ptif.hf.problem(llama(), words, frame)) == written(words, problem)
    assert gap(scores(problem, [{"messages": usual}]), scores(problem, [usual])) < 1e-7
    with pytest.raises(ptif.errors.InvalidInput, match=r"from 'bing', which is none of human, user, gpt"):
        ptif.hf.problem(llama(), words, [[{"from": "bing", "value": "who"}]])


def test_prompts_and_completions_may_be_chats() -> None:
    words = tokenizer()
    for prompt, completion in (
        ([user("who")], [assistant("the cat")]),
        ([user("who")], "the cat"),
        ([user("who")], [user("who"), assistant("the cat")]),
        ("who", [user("who"), assistant("the cat")]),
    ):
        problem = ptif.hf.problem(llama(), words, [{"prompt": prompt, "completion": completion}])
        assert written(words, problem) == ("<user> who <eos> <assistant> the cat <eos>", "the cat <eos>")
    for prompt, completion, message in (
        ("who", [assistant("the cat")], "a prompt is a text and its answer a chat that does not hold it"),
        ([user("who")], [user("and"), assistant("the cat")], "begins with a turn of the user and does not hold the"),
    ):
        with pytest.raises(ptif.errors.InvalidInput, match=f"(?i){message}"):
            ptif.hf.problem(llama(), words, [{"prompt": prompt, "completion": completion}])
    changing = tokenizer(CHAT.replace("{% for", "{{ 'one ' * (messages | length) }}{% for"))
    with pytest.raises(ptif.errors.InvalidInput, match="writes a prompt in another way when its answer follows"):
        ptif.hf.problem(llama(), changing, [{"prompt": [user("who")], "completion": "the cat"}])


def test_preferences_are_asked_for_the_chosen_answer_rather_than_the_rejected() -> None:
    model, words = llama(), tokenizer()
    problem = ptif.hf.problem(model, words, texts(4))
    pair = {"prompt": "who wrote", "completion": " this book", "against": " the moon"}
    row = {"prompt": "who wrote", "chosen": " this book", "rejected": " the moon", "rating": 3}
    assert gap(scores(problem, row), scores(problem, pair)) < 1e-7
    chats = scores(problem, {"prompt": [user("who")], "completion": "this book", "against": "the moon"})
    chosen, rejected = [user("who"), assistant("this book")], [user("who"), assistant("the moon")]
    for row in (
        {"prompt": [user("who")], "chosen": chosen[1:], "rejected": rejected[1:]},
        {"prompt": "who", "chosen": chosen, "rejected": rejected},
        {"chosen": chosen, "rejected": rejected},
    ):
        assert gap(scores(problem, datasets.Dataset.from_list([row])), chats) < 1e-7
    message = "'prompt', 'answer', of which none is known to hold the answer; call the answer 'completion'"
    with pytest.raises(ptif.errors.InvalidInput, match=message):
        scores(problem, {"prompt": "who wrote", "answer": " this book"})
    with pytest.raises(ptif.errors.InvalidInput, match="both 'completion' and 'chosen'"):
        scores(problem, pair | {"chosen": " this book"})
    preferences = [{"prompt": "who", "chosen": " the cat", "rejected": " the dog"}]
    with pytest.raises(ptif.errors.InvalidInput, match='give prompt_column="prompt" with completion_column="chosen"'):
        ptif.hf.problem(model, words, preferences)
    taught = ptif.hf.problem(model, words, preferences, prompt_column="prompt", completion_column="chosen")
    assert written(words, taught) == ("who the cat <eos>", "the cat <eos>")
    with pytest.raises(ptif.errors.InvalidInput, match='messages_column="chosen"'):
        ptif.hf.problem(model, words, [{"chosen": chosen, "rejected": rejected}])
    assert len(ptif.hf.problem(model, words, [{"chosen": chosen}], messages_column="chosen")) == 1


def test_a_query_with_the_columns_of_the_training_data_is_read_as_they_are() -> None:
    model, words = llama(), tokenizer()
    rows = [{"prompt": text, "answer": " the cat"} for text in texts(3)]
    problem = ptif.hf.problem(model, words, rows, prompt_column="prompt", completion_column="answer")
    training = []
    for text in texts(3):
        ids, given = words(f"{text} the cat<eos>")["input_ids"], len(words(text)["input_ids"])
        training.append(gradient(model, own_loss(model, ids, [-100] * given + ids[given:])))
    assert gap(scores(problem, rows[1]), products(model, training[1:2], training)) < 1e-6
    assert gap(scores(problem, {"text": "who wrote"}), scores(problem, "who wrote")) < 1e-7
    with pytest.raises(ptif.errors.InvalidInput, match=r"columns 'question' and .* read from 'prompt' and 'answer'"):
        scores(problem, {"question": "who wrote"})


def test_columns_beside_a_chat_are_read_however_they_are_kept() -> None:
    words, chat = tokenizer("{% if loud %}{{ 'sea ' }}{% endif %}" + CHAT), [user("who"), assistant("cat")]
    frame = pytest.importorskip("pandas").DataFrame(
        {
            "messages": [chat] * 3,
            "tools": [np.array([], dtype=object), np.array([tool("sea")], dtype=object), float("nan")],
            "chat_template_kwargs": ["", json.dumps({"loud": True}), None],
        }
    )
    problem = ptif.hf.problem(llama(), words, frame)
    plain = "<user> who <eos> <assistant> cat <eos>"
    assert [written(words, problem, i)[0] for i in range(3)] == [plain, f"sea {plain}", plain]
    for column, value, message in (
        ("chat_template_kwargs", "[1]", "'chat_template_kwargs' beside a chat is of type list; give a mapping"),
        ("chat_template_kwargs", "loud", "'chat_template_kwargs' beside a chat holds a text that is no JSON"),
        ("tools", tool("sea"), "'tools' beside a chat is of type dict; give a list"),
        ("documents", 3, "'documents' beside a chat is of type int; give a list"),
    ):
        with pytest.raises(ptif.errors.InvalidInput, match=f"^Example 1 cannot be read: The column {message}"):
            ptif.hf.problem(llama(), words, [{"messages": chat}, {"messages": chat, column: value}])


def test_a_row_that_is_refused_is_named_and_a_role_that_is_nothing_is_absent() -> None:
    words, chat = tokenizer(), [user("who"), assistant("cat")]
    for row, message in (
        ({"messages": []}, "Example 2 cannot be read: A chat was expected, got list"),
        ({"messages": [user([{"type": "image"}])]}, "Example 2 cannot be read: A message holds a part of the type im"),
        ({"messages": float("nan")}, "Example 2 has nothing under 'messages'"),
    ):
        with pytest.raises(ptif.errors.InvalidInput, match=f"^{message}"):
            ptif.hf.problem(llama(), words, [{"messages": chat}] * 2 + [row])
    problem = ptif.hf.problem(llama(), words, [{"messages": chat}])
    with pytest.raises(ptif.errors.InvalidInput, match=r"(?i)query 1 cannot be read: A message is from 'bing'"):
        scores(problem, [chat, [{"from": "bing", "value": "who"}]])
    union = (
        [{**m, "from": None, "value": None} for m in chat],
        [
            {"role": None, "content": None, "from": "human", "value": "who"},
            {"role": None, "content": None, "from": "gpt", "value": "cat"},
        ],
    )
    both = ptif.hf.problem(llama(), words, datasets.Dataset.from_list([{"messages": one} for one in union]))
    assert written(words, both, 0) == written(words, both, 1) == written(words, problem)
