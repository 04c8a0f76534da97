# The worker, with simulator and example producer. Any name of a command can follow: docker run … avatar-worker topology
FROM python:3.13-slim AS build
WORKDIR /build
# The programs live in a virtual environment that is built here and copied whole; it has no pip of its own.
RUN python -m venv /build/tools && python -m venv --without-pip /opt/avatar-worker
COPY requirements.lock requirements-build.lock ./
RUN tools/bin/pip --python /opt/avatar-worker install --no-cache-dir --require-hashes -r requirements.lock \
 && tools/bin/pip install --no-cache-dir --require-hashes -r requirements-build.lock
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY worker worker
COPY examples examples
RUN tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
 && tools/bin/pip --python /opt/avatar-worker install --no-cache-dir --no-deps dist/*.whl

FROM python:3.13-slim
# /data is the only place that is written to: the root file system may be read-only.
RUN useradd --uid 10001 --no-create-home worker && install -d -o worker /data
COPY --from=build /opt/avatar-worker /opt/avatar-worker
COPY examples /opt/avatar-worker/examples
ENV PATH=/opt/avatar-worker/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    STORE_URL=sqlite:////data/avatar-worker.db
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8081
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", "\
import os, urllib.request as request; \
port = os.environ.get('OPS_PORT', '8081'); \
direct = request.build_opener(request.ProxyHandler({})); \
port == '0' or direct.open(f'http://127.0.0.1:{port}/healthz', timeout=4)"]
CMD ["avatar-worker", "run"]
