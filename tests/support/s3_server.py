"""A real S3 server (moto's) in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

BUCKET = "results"
SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class S3Server:
    def __init__(self, port: int):
        self.port, self.endpoint = port, f"http://127.0.0.1:{port}"
        self.client = self.connect("s3")
        self.client.create_bucket(Bucket=BUCKET)

    def connect(self, service: str):
        import boto3

        return boto3.client(service, endpoint_url=self.endpoint, region_name="us-east-1")

    def url(self, prefix: str, bucket: str = BUCKET) -> str:
        return f"s3://{bucket}/{prefix}?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def keys(self, prefix: str) -> list[str]:
        """The objects below the prefix, without those that stand for a folder."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix + "/")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return [key.removeprefix(prefix + "/") for key in keys if not key.endswith("/")]


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start the server, with credentials in the environment."""
    credentials = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    with mock.patch.dict(os.environ, credentials):
        os.environ.pop("AWS_PROFILE", None)
        command = [sys.executable, "-c", SERVER]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            yield S3Server(int(server.stdout.readline()))
            server.stdin.close()  # ends it
