"""An MCP server by hand whose one tool, `do`, answers as it is asked to: `python -m hostile_server LOG`.

Each call leaves a point in the log before it is answered.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_TEXT: Final = '{"type": "text", "text": "hi"}'


def _content(block: str) -> str:
    return f'"result": {{"content": [{block}]}}'


def _structured(value: str) -> str:
    return f'"result": {{"content": [{_TEXT}], "structuredContent": {value}}}'


#: What stands in an answer beside its id.
ANSWERS: Final[Mapping[str, str]] = {
    "fine": _content(_TEXT),
    "half a character": _content('{"type": "text", "text": "\\ud800"}'),
    "half a character as key": _structured('{"\\udfff": 1}'),
    "zero character": _content('{"type": "text", "text": "a\\u0000b"}'),
    "NaN": _structured('{"a": NaN}'),
    "infinity": _structured('{"a": [1e400, -Infinity]}'),
    "huge number": _structured('{"a": 1' + "0" * 400 + "}"),
    "a number of many digits": _structured('{"a": 1' + "0" * 10_000 + "}"),
    "nested": _structured('{"a": ' + "[" * 900 + "]" * 900 + "}"),
    "deeply nested": _structured('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "large": _content(f'{{"type": "text", "text": "{"x" * 5_000_000}"}}'),
    "many blocks": _content(", ".join([_TEXT] * 20_000)),
    "a block without a text": _content('{"type": "text"}'),
    "a text that is a number": _content('{"type": "text", "text": 7}'),
    "a block of no known type": _content('{"type": "nonsense", "a": 1}'),
    "a block that is none": _content("7, null, [], true"),
    "a picture that is none": _content('{"type": "image", "data": "\\ud800!", "mimeType": "x"}'),
    "a link to nowhere": _content('{"type": "resource_link", "name": "a"}'),
    "content that is a text": '"result": {"content": "hi"}',
    "no content": '"result": {}',
    "a list": '"result": []',
    "null": '"result": null',
    "structured content that is a list": _structured("[1, 2]"),
    "an error that is none": f'"result": {{"content": [{_TEXT}], "isError": "maybe"}}',
    "usage": f'"result": {{"content": [{_TEXT}], "_meta": {{"usage": {{"totalTokens": -5000, "cost": 1e400}}}}}}',
    "an error of half a character": '"error": {"code": -32000, "message": "\\udce4"}',
    "an error at length": f'"error": {{"code": -32000, "message": "{"x" * 5_000_000}"}}',
    "an error without words": '"error": {"code": "many", "message": null}',
    "an error with a huge code": '"error": {"code": 1' + "0" * 400 + ', "message": "no"}',
    "an error of a tool, without words": '"result": {"content": [], "isError": true}',
    "both": f'{_content(_TEXT)}, "error": {{"code": 1, "message": "no"}}',
    "neither": '"a": 1',
    "no JSON": "[[[",
    "another's": '"id": 999999, "result": {}',
}


def main() -> None:
    log = Path(sys.argv[1])
    tool = {"name": "do", "inputSchema": {"type": "object", "properties": {"what": {"type": "string"}}}}
    for line in sys.stdin:
        asked = json.loads(line)
        if "id" not in asked:
            continue
        rest = '"error": {"code": -32601, "message": "no such method"}'
        if asked["method"] == "initialize":
            version = asked["params"]["protocolVersion"]
            info = {
                "protocolVersion": version,
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "h", "version": "1"},
            }
            rest = f'"result": {json.dumps(info)}'
        elif asked["method"] == "tools/list":
            rest = f'"result": {json.dumps({"tools": [tool]})}'
        elif asked["method"] == "tools/call":
            with log.open("a") as file:
                file.write(".")
            rest = ANSWERS[asked["params"]["arguments"]["what"]]
        sys.stdout.write(f'{{"jsonrpc": "2.0", "id": {json.dumps(asked["id"])}, {rest}}}\n')
        sys.stdout.flush()


if __name__ == "__main__":
    main()
