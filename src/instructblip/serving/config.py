"""The settings of a server: every limit on a request."""

import resource

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from instructblip.model.decoding import NumBeams


def _most_connections() -> int:
    """512, or what leaves 128 descriptors of the process for files."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if limit == resource.RLIM_INFINITY else max(16, min(512, limit - 128))


class ServeConfig(BaseModel):
    """Limits are maxima per request unless they say otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_batch: PositiveInt = 32
    """Requests that the model answers together."""
    max_queue: PositiveInt = 128
    """Requests that wait; those beyond are answered with 429."""
    shared_mb: NonNegativeInt = 128
    """MiB of image features and read prompts that each model keeps for requests about the same
    images."""
    max_connections: int = Field(default_factory=_most_connections, ge=16)
    """Open connections; a new one closes the one that has waited longest for a request."""
    max_body_bytes: PositiveInt = 24 << 20
    """Bytes of a whole request."""
    max_json_bytes: PositiveInt = 512 << 10
    """Bytes of a request without the data URLs of its images."""
    max_picture_bytes: PositiveInt = 16 << 20
    """Bytes of one image file."""
    max_pixels: PositiveInt = 1 << 24
    """Pixels of one image (4096 x 4096)."""
    max_pictures: PositiveInt = 8
    """Images."""
    max_tokens: PositiveInt = 256
    """Tokens of an answer."""
    max_beams: NumBeams = 8
    """Beams of a search: n beams cost n answers."""
    max_text_characters: PositiveInt = 32_000
    """Characters of all messages together, or of an instruction."""
    max_candidates: PositiveInt = 256
    """Candidates to rank."""
    max_candidate_characters: PositiveInt = 32_000
    """Characters of all candidates together."""
    timeout_s: PositiveFloat = 60.0
    """Seconds from a request's arrival to its answer, waiting included; then it is 504."""
    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    """Keys, one of which every request must carry; none: open to all who can reach the port."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which the server is reached, beside localhost and addresses; others get 421."""
    image_hosts: tuple[str, ...] = ()
    """Hosts from which images may be fetched over https; none: data URLs only."""
