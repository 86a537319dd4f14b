"""`type: artifact`: keeps a value in the artifact store under its sha256; the output says which.

    report:
      type: artifact
      name: report.md
      content: "{{ summary }}"

`ferrum artifacts get sha256:…` reads it back. Text is stored as it is, everything else as JSON. The name goes with
the reference only: the same content under two names is one artifact, and storing it again changes nothing.
"""

from __future__ import annotations

import json
import mimetypes

from pydantic import Field, JsonValue

from ferrum.steps import Attempt, Params, StepType
from ferrum.workflow import Retry


class ArtifactParams(Params):
    content: JsonValue = Field(description="What is kept: text as it is, any other value as JSON.")
    name: str = Field(min_length=1, max_length=255, description="What people call it, such as `report.md`.")
    media_type: str | None = Field(
        None, description="Default: by the name's ending, else `text/markdown`; `application/json` where not text."
    )


class Artifact(StepType[ArtifactParams]):
    """Its output is `{"name", "artifact": "sha256:…", "size", "media_type"}`."""

    name = "artifact"
    params = ArtifactParams
    retry = Retry(max_attempts=3)
    timeout_s = 120.0

    def run(self, params: ArtifactParams, attempt: Attempt) -> JsonValue:
        # Here and not above: who only plans a workflow needs no store.
        from ferrum.artifacts import process_artifacts

        ref = process_artifacts().put(_bytes(params.content), params.media_type or _media_type(params))
        return {"name": params.name, "artifact": ref.digest, "size": ref.size, "media_type": ref.media_type}


def _bytes(content: JsonValue) -> bytes:
    if isinstance(content, str):
        # A lone surrogate, which JSON can say and UTF-8 cannot, becomes a question mark.
        return content.encode(errors="replace")
    return json.dumps(content, ensure_ascii=False, indent=2).encode(errors="replace")


def _media_type(params: ArtifactParams) -> str:
    if not isinstance(params.content, str):
        return "application/json"
    return mimetypes.guess_type(params.name, strict=False)[0] or "text/markdown"
