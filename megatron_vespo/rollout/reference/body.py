"""What the reference engine's routes share."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    # A field of SGLang's that this engine would ignore is refused: silence would be a wrong answer.
    model_config = ConfigDict(extra="forbid")


def refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status_code=status)
