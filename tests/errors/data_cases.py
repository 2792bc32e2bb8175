"""Bad input: prompts and rewards."""

from __future__ import annotations

from tests.errors.case import BadInput, config, rows, start

A = "Prompts"
REWARDS = "Rewards"
GOOD = '{"prompt": "a", "answer": "1"}'
CASES = (
    BadInput(
        A,
        "a file that is not there",
        "tran.jsonl: no such file (did you mean 'train.jsonl'?)",
        "Paths are relative to the working directory.",
        start("data.train=[{{path: examples/tiny_reasoner/tran.jsonl}}]"),
    ),
    BadInput(
        A, "a line that is no JSON", "my.jsonl, line 2: not valid JSON", "Correct the line.", rows(GOOD + "\n{not json")
    ),
    BadInput(
        A,
        '`{"question_text": "a", "answer": "1"}`',
        "my.jsonl, line 1: no prompt: tried …; keys here:",
        "Set `data.input_key` to one of the keys that are there.",
        rows('{"question_text": "a", "answer": "1"}'),
    ),
    BadInput(
        A,
        '`{"prompt": "a", "anser": "1"}`',
        "my.jsonl, line 1: no answer: tried …; keys here:",
        "Set `data.label_key`, or correct the column.",
        rows('{"prompt": "a", "anser": "1"}'),
    ),
    BadInput(
        A,
        '`{"prompt": " ", "answer": "1"}`',
        "the prompt is empty: nothing but white space",
        "Leave the row out.",
        rows('{"prompt": " ", "answer": "1"}'),
    ),
    BadInput(
        A,
        "messages that end with the system's",
        "the last message is from 'system'; expected 'user'",
        "A prompt ends with the user's turn. Closing assistant turns are left out by themselves.",
        rows('{"prompt": [{"role": "system", "content": "x"}], "answer": "1"}'),
    ),
    BadInput(A, "an empty file", "my.jsonl: no rows", "Name a file with rows.", rows("")),
    BadInput(
        A,
        "a kind of file that is not known",
        "README.md: unknown kind of file; expected",
        "Convert it to one of the named kinds.",
        start("data.train=[{{path: README.md}}]"),
    ),
    BadInput(
        A,
        "a pattern without a file",
        "no prompt file matches this pattern",
        "Correct the pattern. It is relative to the working directory.",
        start("data.train=[{{path: {here}/*.jsonl}}]"),
    ),
    BadInput(
        A,
        "`{path: x, reasoning_gym: chain_sum}`",
        "data.train.…: set exactly one of path and reasoning_gym",
        "Leave one of the two out.",
        config("data.train=[{path: x.jsonl, reasoning_gym: chain_sum}]"),
    ),
    BadInput(
        A,
        "`{path: []}`",
        "data.train.….path: the list is empty; name at least one file",
        "Name a file.",
        config("data.train=[{path: []}]"),
    ),
    BadInput(
        A,
        "a weight on one of two sources",
        "data.train.… has no weight, but other sources have one",
        "Set `weight` for all sources or for none.",
        config("data.train=[{path: a.jsonl, weight: 1}, {path: b.jsonl}]"),
    ),
    BadInput(
        A,
        "`data.chat_template=nowhere.jinja`",
        "data.chat_template: cannot read nowhere.jinja",
        "Name a file with a Jinja template.",
        start("data.chat_template=nowhere.jinja", "data.apply_chat_template=true"),
    ),
    BadInput(
        A,
        "`data.apply_chat_template=true` for a model without one",
        "the tokenizer has no chat template",
        "Use plain text, set `data.chat_template` to a Jinja file, or take a chat model.",
        start("data.apply_chat_template=true"),
    ),
    BadInput(
        A,
        "a truth that stands for none",
        "the truth, or one of the accepted answers, is blank",
        "Fill in the answer or leave the row out.",
        rows('{"prompt": "1", "answer": " "}'),
    ),
    BadInput(
        A,
        '`"answer": NaN`',
        "the truth is nan, which no answer can equal",
        "Write a finite number or a text; infinity as an answer is `\\infty`.",
        rows('{"prompt": "1", "answer": NaN}'),
    ),
    BadInput(
        A,
        "`params: {seed: 3}` of a task",
        "params has seed 3; set seed beside params",
        "Set `seed` and `size` beside `params`.",
        start("data.train=[{{reasoning_gym: chain_sum, size: 4, seed: 1, params: {{seed: 3}}}}]"),
    ),
    BadInput(
        A,
        "a seed beyond the tasks'",
        "exceeds 4294967295",
        "Lower the seed.",
        start("data.train=[{{reasoning_gym: chain_sum, size: 4, seed: 4294967295}}]"),
    ),
    BadInput(
        REWARDS,
        "`data.verifier=boxd`",
        "unknown verifier 'boxd' (did you mean 'boxed'?)",
        "Use a name from the list, or `path/to/file.py:function`.",
        start("data.verifier=boxd"),
    ),
    BadInput(
        REWARDS,
        "`data.verifier=nowhere.py:score`",
        "verifier 'nowhere.py:score': cannot read nowhere.py",
        "Correct the path.",
        start("data.verifier=nowhere.py:score"),
    ),
    BadInput(
        REWARDS,
        "`data.verifier=http:judge` without that server",
        "no server of that name in reward.servers",
        "Correct the name, or add the server.",
        start("data.verifier=http:judge"),
    ),
    BadInput(
        REWARDS,
        "a server that nothing asks",
        "reward.servers.…: nothing asks it",
        "Name it as `http:NAME` in `data.verifier` or `reward.functions`.",
        start("reward.servers=[{{name: judge, url: http://127.0.0.1:9/score}}]"),
    ),
    BadInput(
        REWARDS,
        "`reward.overlong.buffer_len` above the response's length",
        "reward.overlong.buffer_len … exceeds rollout.max_response_len",
        "Choose a shorter buffer: DAPO has 4096 of 20480 tokens.",
        config("reward.overlong={buffer_len: 100, penalty: 1.0}"),
    ),
    BadInput(
        REWARDS,
        "`reward.num_workers=0`",
        "reward.num_workers: … (got 0)",
        "Give at least one worker.",
        config("reward.num_workers=0"),
    ),
)
