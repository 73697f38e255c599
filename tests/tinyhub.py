"""A loopback Hugging Face Hub for tests: the protocol of the real client over real HTTP, in memory.

    with TinyHub() as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)

Large files travel over git-LFS with HF_HUB_DISABLE_XET=1. With hf_xet on, which is what users get, its built-in
``local://`` store stands in for Xet storage, and the uploaded shards tell which xet hash belongs to which SHA-256; a
repository written one way is read the same way. Not all of the Hub is here: what sdtune and diffusers ask for is.
"""

import base64
import datetime
import hashlib
import json
import pathlib
import re
import socket
import struct
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (
    ".safetensors .bin .pt .pth .ckpt .onnx .npz .npy .msgpack .parquet .arrow .gz .zip .tar .png .jpg "
    ".jpeg .webp .gif .mp4"
).split()
LFS_SIZE = 10 * 1024 * 1024
PREFIX = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


def git_blob_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def xet_files(store):
    """{sha256: xet hash} of every file in a local:// Xet store, read from its shards."""

    def text(raw):
        return "".join(raw[i : i + 8][::-1].hex() for i in range(0, 32, 8))

    found = {}
    for shard in store.glob("xet/xorbs/shards/*.mdb"):
        data, at = shard.read_bytes(), 48  # after the shard header
        while data[at : at + 32] != b"\xff" * 32:  # file section, up to its bookend
            name, (flags, entries) = text(data[at : at + 32]), struct.unpack("<II", data[at + 32 : at + 40])
            at += 48 * (1 + entries + (entries if flags & 1 << 31 else 0))  # segments, then verification entries
            if flags & 1 << 30:  # metadata: the sha256
                found[text(data[at : at + 32])] = name
                at += 48
    return found


class HubError(Exception):
    def __init__(self, status, message, code=None, headers=None, **extra):
        super().__init__(message)
        self.status, self.message, self.code, self.headers, self.extra = status, message, code, headers or {}, extra


class Repo:
    def __init__(self, kind, repo_id, private, owner):
        self.kind, self.id, self.private = kind, repo_id, private
        self.commits, self.refs, self.discussions = {}, {}, []
        self.commit("refs/heads/main", {".gitattributes": b""}, "initial commit", "", owner, {})

    def commit(self, ref, files, title, message, author, blobs):
        tree = {p: blobs.get(p) or {"size": len(d), "oid": git_blob_oid(d), "data": d} for p, d in files.items()}
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        parent = self.refs.get(ref)
        listing = sorted((p, f.get("lfs", f["oid"])) for p, f in tree.items())
        oid = hashlib.sha1(repr((parent, listing, title, date, len(self.commits))).encode()).hexdigest()
        self.commits[oid] = {"id": oid, "parent": parent, "tree": tree, "title": title, "message": message}
        self.commits[oid] |= {"date": date, "author": author}
        self.refs[ref] = oid
        return oid

    def resolve(self, rev):
        for ref in (rev, f"refs/heads/{rev}"):
            if ref in self.refs:
                return self.refs[ref]
        if rev in self.commits:
            return rev
        raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    def history(self, oid):
        while oid:
            yield self.commits[oid]
            oid = self.commits[oid]["parent"]


class TinyHub:
    """State and a threaded server.

    ``requests`` holds (method, path, JSON body or None, status), ``sent`` every body as it came, and ``faults`` what
    `fail` was told.
    """

    token, user = "hf_" + "tinyhubtoken" * 3, "tester"

    def __init__(self, root=None, users=None):
        self.root = pathlib.Path(root or tempfile.mkdtemp(prefix="tinyhub-"))
        self.blobs = self.root / "lfs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.cas = self.root / "cas"
        self.users = users or {self.token: (self.user, "write")}  # token -> (user name, role)
        self.repos, self.requests, self.sent, self.faults, self.lock = {}, [], [], [], threading.RLock()
        self.port = 0

    def fail(self, pattern, what, times=1, **headers):
        """Meet the next ``times`` requests whose 'METHOD path' matches ``pattern`` with a fault.

        ``what`` is a status; "cut" (the connection ends in the middle of the body); or a function to call first.
        """
        self.faults.append([re.compile(pattern), what, times, {k.replace("_", "-"): v for k, v in headers.items()}])

    def fault(self, request):
        """The fault that this request meets, used up; ``(None, {})`` without one."""
        with self.lock:
            for fault in self.faults:
                if fault[2] > 0 and fault[0].search(request):
                    fault[2] -= 1
                    return fault[1], fault[3]
        return None, {}

    def start(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = _Server(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port, self.dead = self.server.server_address[1], False
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def close(self):
        """As if it was killed: nothing listens any more, and connections that are open end. `start` revives it."""
        self.dead = True
        threading.Thread(target=self.server.shutdown).start()
        self.server.server_close()

    def files(self, repo, ref="refs/heads/main"):
        """Path to content of each file."""
        repo = self.repos["models", repo]
        tree = repo.commits[repo.refs[ref]]["tree"]
        return {p: f["data"] if "data" in f else (self.blobs / f["lfs"]).read_bytes() for p, f in tree.items()}

    def titles(self, repo, ref="refs/heads/main"):
        """Titles of the commits, the newest first."""
        repo = self.repos["models", repo]
        return [commit["title"] for commit in repo.history(repo.refs[ref])]

    __enter__ = start

    def __exit__(self, *exc):
        if not self.dead:
            self.close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that hangs up is no error of the server; a test prints nothing when it passes."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: TinyHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    # ---- plumbing -----------------------------------------------------------------------------------------------
    def _run(self):
        hub, parts = self.hub, urlsplit(self.path)
        self.query = {k: v[-1] for k, v in parse_qs(parts.query).items()}
        self.seg = [unquote(s) for s in parts.path.strip("/").split("/")]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        self.user, self.role = hub.users.get(token, (None, None))
        fault, headers = hub.fault(f"{self.command} {self.path}")
        if callable(fault):
            fault()
        if hub.dead or fault == "cut":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.body = self._read_body()
        try:
            if isinstance(fault, int):
                raise HubError(fault, "injected fault", headers=headers)
            with hub.lock:
                self._route(parts.path)
        except HubError as err:
            headers = {"X-Error-Message": err.message} | ({"X-Error-Code": err.code} if err.code else {})
            self._json({"error": err.message, **err.extra}, err.status, headers | err.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _run  # noqa: N815

    def _read_body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            length = int(self.headers.get("Content-Length") or 0)
            data = self.rfile.read(length)
            if len(data) < length:
                raise ConnectionAbortedError  # the client was killed while it sent
        self.hub.sent.append(data)
        kind = self.headers.get("Content-Type", "")
        if "ndjson" in kind:
            return [json.loads(line) for line in data.splitlines() if line.strip()]
        return json.loads(data) if data and "json" in kind else (data or None)

    def _send(self, data, status=200, headers=None, length=None):
        log = self.body if not isinstance(self.body, bytes) else f"<{len(self.body)} bytes>"
        self.hub.requests.append((self.command, self.path, log, status))
        self.send_response(status)
        for key, value in {"Content-Length": len(data) if length is None else length, **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value, status=200, headers=None):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _need_user(self):
        if not self.user:
            raise HubError(401, "Invalid username or password.")

    def _repo(self, kind, repo_id, write=False):
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and self.user != repo_id.split("/")[0]):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._need_user()
            if self.user != repo_id.split("/")[0] or self.role == "read":
                raise HubError(403, f"You don't have the rights to write to {repo_id}")
        return repo

    # ---- routes -------------------------------------------------------------------------------------------------
    def _route(self, path):
        seg, method = self.seg, self.command
        if path == "/api/whoami-v2":
            self._need_user()
            role = {"accessToken": {"displayName": "test", "role": self.role}}
            about = {"type": "user", "id": "0", "name": self.user, "fullname": self.user, "orgs": [], "auth": role}
            return self._json(about)
        if path == "/api/repos/create":
            return self._create()
        if path == "/api/validate-yaml":
            return self._validate_yaml()
        if seg[0] == "lfs-store":
            return self._lfs_store(seg[1], seg[2] if len(seg) > 2 else None)
        if path.endswith(".git/info/lfs/objects/batch"):
            kind = seg[0] if seg[0] in PREFIX else "models"
            repo_id = path.strip("/").removeprefix(PREFIX[kind]).split(".git/")[0]
            return self._lfs_batch(self._repo(kind, repo_id))
        if seg[0] == "api" and seg[1] in PREFIX and len(seg) >= 4:
            return self._repo_api(seg[1], f"{seg[2]}/{seg[3]}", seg[4:])
        kind = seg[0] if seg[0] in PREFIX else "models"
        rest = seg[1:] if seg[0] in PREFIX else seg
        if len(rest) >= 5 and rest[2] in ("resolve", "raw") and method in ("GET", "HEAD"):
            return self._resolve(self._repo(kind, "/".join(rest[:2])), rest[3:])
        raise HubError(404, f"no such route: {method} {path}")

    def _create(self):
        self._need_user()
        body = self.body
        kind, name = body.get("type", "model") + "s", f"{body.get('organization') or self.user}/{body['name']}"
        url = f"{self.hub.url}/{PREFIX[kind]}{name}"
        if name.split("/")[0] != self.user:
            raise HubError(403, f"You don't have the rights to create a {kind[:-1]} under {name.split('/')[0]}")
        if (kind, name) in self.hub.repos:
            raise HubError(409, f"You already created this {kind[:-1]} repo", url=url)
        self.hub.repos[kind, name] = Repo(kind, name, body.get("visibility") == "private", self.user)
        self._json({"url": url, "name": name, "id": name})

    def _validate_yaml(self):
        content, errors, warnings = self.body["content"], [], []
        match = re.match(r"^---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.S)
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as err:
            data = errors.append({"message": f"bad yaml: {err}"})
        if not errors and not data:
            warnings.append({"message": "empty or missing yaml metadata in repo card"})
        kinds = {"tags": list, "datasets": (str, list), "widget": list, "instance_prompt": (str, type(None))}
        kinds |= dict.fromkeys(("license", "base_model"), (str, list))
        for key, kind in (kinds | dict.fromkeys(("library_name", "pipeline_tag"), str)).items():
            if key in (data or {}) and not isinstance(data[key], kind):
                errors.append({"message": f'"{key}" has the wrong type'})
        self._json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def _lfs_batch(self, repo):
        objects = []
        for item in self.body["objects"]:
            href = f"{self.hub.url}/lfs-store/{item['oid']}"
            todo = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            known = (self.hub.blobs / item["oid"]).exists()
            objects.append({**item, "authenticated": True} | ({} if known else {"actions": todo}))
        self._json({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def _lfs_store(self, oid, action):
        blob = self.hub.blobs / oid
        if action == "verify":
            ok = blob.exists() and blob.stat().st_size == self.body["size"]
            self._json({}, 200 if ok else 404)
            return
        data = self.body or b""
        if hashlib.sha256(data).hexdigest() != oid:
            raise HubError(400, "content does not match oid")
        blob.write_bytes(data)
        self._send(b"", headers={"ETag": f'"{oid}"'})

    def _repo_api(self, kind, repo_id, rest):
        write = self.command in ("POST", "DELETE") and (rest or [""])[0] not in ("preupload", "paths-info")
        if rest[:1] == ["commit"] and (self.query.get("create_pr") or rest[1].startswith("refs/pr/")):
            write = False  # anybody may open a pull request
        repo, verb = self._repo(kind, repo_id, write), rest[0] if rest else "revision"
        if verb == "auth-check":
            if rest[1:] == ["write"]:
                self._repo(kind, repo_id, write=True)
            return self._json({})
        if verb == "discussions":
            found = [d for d in repo.discussions if self.query.get("author") in (None, d["author"]["name"])]
            return self._json({"discussions": found, "count": len(found), "start": 0})
        if verb == "commit":
            return self._commit(repo, rest[1])
        if verb == "preupload":
            return self._preupload(repo, rest[1])
        if verb == "revision":
            return self._info(repo, repo.resolve(rest[1] if len(rest) > 1 else "main"))
        if verb in ("tree", "paths-info"):
            return self._tree(repo, rest[1], "/".join(rest[2:]))
        if verb in ("xet-write-token", "xet-read-token"):
            url, expiry = f"local://{self.hub.cas}", int(time.time()) + 3600
            headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expiry}
            return self._json({"casUrl": url, "accessToken": "xet", "exp": expiry}, headers=headers)
        if verb == "branch":
            ref = f"refs/heads/{rest[1]}"
            if ref in repo.refs:
                raise HubError(409, f"Reference already exists: {ref}")
            repo.refs[ref] = repo.resolve((self.body or {}).get("startingPoint", "main"))
            return self._json({})
        raise HubError(404, f"no such route: {self.command} {self.path}")

    def _preupload(self, repo, rev):
        try:
            tree = repo.commits[repo.resolve(rev)]["tree"]
        except HubError:
            tree = {}
        files = []
        for item in self.body["files"]:
            suffix, sample = pathlib.PurePosixPath(item["path"]).suffix.lower(), base64.b64decode(item["sample"])
            lfs = suffix in LFS_SUFFIXES or item["size"] > LFS_SIZE or b"\0" in sample
            old = tree.get(item["path"], {})
            file = {"path": item["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            files.append(file | {"oid": old.get("lfs", old.get("oid"))})
        self._json({"files": files})

    def _commit(self, repo, rev):
        header, ops = self.body[0]["value"], self.body[1:]
        if rev not in repo.refs and f"refs/heads/{rev}" not in repo.refs:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        ref = rev if rev in repo.refs else f"refs/heads/{rev}"
        head = repo.refs[ref]
        if header.get("parentCommit") and not head.startswith(header["parentCommit"]):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.commits[head]["tree"])
        for op in ops:
            path, value = op["value"]["path"], op["value"]
            if op["key"] == "file":
                data = base64.b64decode(value["content"])
                tree[path] = {"size": len(data), "oid": git_blob_oid(data), "data": data}
            elif op["key"] == "lfsFile":
                blob, xet = self.hub.blobs / value["oid"], xet_files(self.hub.cas).get(value["oid"])
                if not blob.exists() and not xet:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
                size = value.get("size") or blob.stat().st_size
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n"
                tree[path] = {"size": size, "oid": git_blob_oid(pointer.encode()), "lfs": value["oid"]}
                if not blob.exists():
                    tree[path]["xet"] = xet
            elif op["key"] == "deletedFile":
                if tree.pop(path, None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            elif op["key"] == "deletedFolder":
                tree = {p: f for p, f in tree.items() if not p.startswith(path.rstrip("/") + "/")}
        web, extra = f"{self.hub.url}/{PREFIX[repo.kind]}{repo.id}", {}
        if self.query.get("create_pr"):
            num = len(repo.discussions) + 1
            opened = {"title": header["summary"], "num": num, "author": {"name": self.user}, "status": "open"}
            opened |= {"repo": {"name": repo.id, "type": "model"}, "isPullRequest": True}
            repo.discussions.append(opened | {"createdAt": repo.commits[head]["date"]})
            ref = f"refs/pr/{num}"
            repo.refs[ref], extra["pullRequestUrl"] = head, f"{web}/discussions/{num}"
        message = header.get("description", "")
        oid = repo.commit(ref, dict.fromkeys(tree, b""), header["summary"], message, self.user, tree)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{web}/commit/{oid}", "hookOutput": "", **extra})

    def _info(self, repo, oid):
        tree = repo.commits[oid]["tree"]
        card = re.match(r"^---\n(.*?)\n---", tree.get("README.md", {}).get("data", b"").decode(), re.S)
        card = yaml.safe_load(card[1]) if card else {}
        siblings = [
            {"rfilename": p} | ({"size": f["size"], "blobId": f["oid"]} if self.query.get("blobs") else {})
            for p, f in sorted(tree.items())
        ]
        info = {"_id": "0", "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": oid}
        info |= {"gated": False, "private": repo.private, "disabled": False, "downloads": 0, "likes": 0}
        info |= {"lastModified": repo.commits[oid]["date"], "createdAt": next(reversed([*repo.history(oid)]))["date"]}
        info |= {"siblings": siblings, "cardData": card, "tags": card.get("tags", [])}
        info |= {key: card.get(key) for key in ("pipeline_tag", "library_name")}
        self._json(info)

    def _tree(self, repo, rev, under):
        tree, out, dirs = repo.commits[repo.resolve(rev)]["tree"], [], set()
        wanted = self.body.get("paths") if isinstance(self.body, dict) else None
        deep = wanted is not None or self.query.get("recursive", "").lower() == "true"
        for path, file in sorted(tree.items()):
            if under and not path.startswith(under + "/"):
                continue
            inner = path[len(under) + 1 if under else 0 :]
            dirs |= {str(p) for p in pathlib.PurePosixPath(path).parents if str(p) != "." and len(str(p)) > len(under)}
            if deep or "/" not in inner:
                lfs = {"lfs": {"oid": file["lfs"], "size": file["size"], "pointerSize": 134}} if "lfs" in file else {}
                lfs |= {"xetHash": file["xet"]} if "xet" in file else {}
                out.append({"type": "file", "path": path, "size": file["size"], "oid": file["oid"], **lfs})
        if under and not out and not dirs:
            raise HubError(404, f"{under} does not exist", "EntryNotFound")
        out += [
            {"type": "directory", "path": d, "size": 0, "oid": hashlib.sha1(d.encode()).hexdigest()}
            for d in sorted(dirs)
            if deep or "/" not in d[len(under) + 1 if under else 0 :]
        ]
        self._json([e for e in out if wanted is None or e["path"] in wanted])

    def _resolve(self, repo, rest):
        # the revision may hold slashes only when quoted (refs%2Fpr%2F1): it is always one segment here
        oid, path = repo.resolve(rest[0]), "/".join(rest[1:])
        headers = {"X-Repo-Commit": oid}
        file = repo.commits[oid]["tree"].get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        etag = file.get("lfs", file["oid"])
        headers |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if "lfs" in file:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": file["size"]}
        if "xet" in file:
            route = f"{self.hub.url}/api/{repo.kind}/{repo.id}/xet-read-token/{oid}"
            headers |= {"X-Xet-Hash": file["xet"], "X-Xet-Refresh-Route": route}
        if self.command == "HEAD":
            self._send(b"", 200, headers, length=file["size"])
            return
        if "xet" in file and not (self.hub.blobs / file["lfs"]).exists():
            import hf_xet  # a plain GET of a file uploaded over xet

            store = {"endpoint": f"local://{self.hub.cas}", "token": "xet"}
            info, expiry = hf_xet.XetFileInfo(file["xet"], file["size"]), int(time.time()) + 3600
            with hf_xet.XetSession().new_file_download_group(**store, token_expiry_unix_secs=expiry) as group:
                group.start_download_file(info, str(self.hub.blobs / file["lfs"]))
        data = (self.hub.blobs / file["lfs"]).read_bytes() if "lfs" in file else file["data"]
        if match := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            self._send(data[start : end + 1], 206, headers)
        else:
            self._send(data, 200, headers)
