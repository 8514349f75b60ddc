# An image that serves a model, and has every other command: docs/howto/container.md.
FROM debian:12.15-slim

# PyTorch for a CPU. PyPI has it for CUDA: --build-arg TORCH_INDEX=https://pypi.org/simple
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PATH=/opt/instructblip/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_CONSTRAINT=/opt/build/constraints.txt \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# Packages of a point release change for security alone, so their newest versions are wanted.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/instructblip \
    && useradd --uid 10001 --create-home instructblip \
    && mkdir /data /models \
    && chown instructblip:instructblip /data /models

# What changes least comes first: PyTorch, then the other packages, then this one.
WORKDIR /opt/build
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --extra-index-url "$TORCH_INDEX" torch

COPY pyproject.toml ./
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*project["dependencies"], *project["optional-dependencies"]["serve"], sep="\n")' > packages.txt \
    && pip install --requirement packages.txt

RUN --mount=type=bind,target=/opt/context pip install --no-deps /opt/context

USER 10001:10001
WORKDIR /data
ENV XDG_CACHE_HOME=/models/cache \
    HF_HOME=/models/huggingface
VOLUME ["/data", "/models"]
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as web; web.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["instructblip"]
CMD ["serve", "--model", "starter", "--host", "0.0.0.0"]
