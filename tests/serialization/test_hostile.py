"""Stored text that somebody else wrote: nothing is imported, built or called that is not a value of ours."""

import contextlib
import importlib.util
import json
import sys
import threading
import time
from itertools import count

import pytest
from django.apps import apps
from hypothesis import given, settings
from hypothesis import strategies as st

from django_durable.exceptions import SerializationError, StepFailed
from django_durable.serialization import dumps, load_exception, loads, types, values
from tests.serialization import samples

WATCHED = (
    "import",
    "exec",
    "compile",
    "open",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.remove",
    "socket.connect",
)
seen: list[tuple[str, str]] | None = None


def watch(event: str, args: tuple[object, ...]) -> None:
    if seen is not None and event in WATCHED:
        seen.append((event, str(args[:1])))


sys.addaudithook(watch)


@pytest.fixture
def audited():
    """What the interpreter did on the way: imports, opened files, processes, connections."""
    global seen
    seen = []
    finder = ImportWatch()
    sys.meta_path.insert(0, finder)
    yield seen
    sys.meta_path.remove(finder)
    seen = None


class ImportWatch:
    """Sees every import of what is not loaded: importlib's own raise no audit event until they find something."""

    def find_spec(self, name, path=None, target=None):
        if seen is not None:
            seen.append(("import", name))


def test_the_watch_sees_an_import_that_finds_nothing(audited):
    with contextlib.suppress(ImportError):
        importlib.import_module("no_such_module")
    assert ("import", "no_such_module") in audited


def refused(text):
    # By hand: pytest.raises does things of its own that an audit would see.
    try:
        loads(text)
    except SerializationError as error:
        return error
    raise AssertionError(f"read without a complaint: {text[:200]}")


CLASSES = [
    "subprocess:Popen",
    "os:system",
    "os:_wrap_close",
    "builtins:eval",
    "builtins:object",
    "builtins:type",
    "builtins:dict",
    "this:Zen",
    "antigravity:x",
    "tests.serialization.samples:Money",
    "tests.serialization.samples:Money.__init__",
    "tests.serialization.samples:calls",
    "tests.serialization.samples:dataclass",
    "tests.serialization.samples:models.Model",
    "tests.serialization.samples:Outer.Inner.__class__",
    "tests.serialization.samples:Colour.__members__",
    "tests.serialization.samples:function.<locals>.Local",
    "tests.serialization.samples:",
    "tests.serialization.samples",
    ":",
    "",
    ".:x",
    "..tests:x",
    "sys:modules.os.system",
    "django.contrib.auth.models:User",
    "django.contrib.auth:nothing",
    "django.contrib.authentic:x",
    "logging:Logger",
    "x" * 10_000 + ":y",
    "\ud83d\0:\udc80",
    None,
    1,
    [],
    {"a": 1},
]


@pytest.mark.parametrize("kind", ["enum", "dataclass", "pydantic", "exc", "type"])
@pytest.mark.parametrize("name", CLASSES, ids=count())
def test_a_class_that_is_not_of_the_kind_is_neither_imported_nor_built(kind, name, audited, calls):
    before = set(sys.modules)
    refused(json.dumps({"$": kind, "c": name, "v": {"args": "ls"}, "a": ["ls"], "set": []}))
    assert not audited
    assert not calls
    assert set(sys.modules) == before


@pytest.mark.parametrize("name", CLASSES, ids=count())
def test_a_failure_with_a_hostile_class_is_only_its_text(name, audited, calls):
    text = json.dumps({"type": "Boom", "text": "t", "error": {"$": "exc", "c": name, "a": ["touch /tmp/x"]}})
    assert type(load_exception(text)) is StepFailed
    assert not audited
    assert not calls


@pytest.mark.parametrize(
    "text", ['{"type":"a","text":"b","error":5}', '{"type":"a","text":"b","error":{"$":"tuple","v":[]}}']
)
def test_a_failure_that_holds_no_exception_is_only_its_text(text):
    assert type(load_exception(text)) is StepFailed


def test_a_modules_getattr_hook_is_not_triggered(monkeypatch, calls):
    monkeypatch.setattr(samples, "__getattr__", lambda name: calls.append(name), raising=False)
    refused('{"$":"exc","c":"tests.serialization.samples:Absent","a":[]}')
    assert not calls


def test_something_in_sys_modules_that_is_no_module_is_not_asked(monkeypatch, calls):
    class Lazy:
        def __getattribute__(self, name):
            calls.append(name)
            return ValueError

    monkeypatch.setitem(sys.modules, "lazy_thing", Lazy())
    assert "neither loaded" in refused('{"$":"exc","c":"lazy_thing:Anything","a":[]}').problem
    assert not calls


@pytest.fixture
def unloaded_app_modules(tmp_path, monkeypatch):
    """An installed app with modules that nobody has imported yet."""
    package = tmp_path / "hostileapp"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "errors.py").write_text("class Declined(Exception):\n    pass\n")
    (package / "__main__.py").write_text("class Declined(Exception):\n    pass\n")
    (package / "slow.py").write_text("import time\ntime.sleep(0.2)\nclass Declined(Exception):\n    pass\n")
    (package / "broken.py").write_text("1 / 0\n")
    (tmp_path / "hostileapp_other.py").write_text("class Declined(Exception):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    app = apps.get_app_config("auth").create("hostileapp")
    monkeypatch.setitem(apps.app_configs, "hostileapp", app)
    yield
    for name in [name for name in sys.modules if name.startswith("hostileapp")]:
        del sys.modules[name]


@pytest.mark.usefixtures("unloaded_app_modules")
def test_only_modules_of_installed_apps_are_loaded_for_a_stored_class():
    error = loads('{"$":"exc","c":"hostileapp.errors:Declined","a":["x"]}')
    assert repr(error) == "Declined('x')"
    for module in [
        "hostileapp_other",
        "hostileapp.__main__",
        "hostileapp..errors",
        "hostileapp.absent",
        "hostileapp.errors.x",
    ]:
        refused(json.dumps({"$": "exc", "c": f"{module}:Declined", "a": ["x"]}))
        assert module not in sys.modules
    assert importlib.util.find_spec("hostileapp_other"), "it was there to be imported"


@pytest.mark.usefixtures("unloaded_app_modules")
def test_a_module_that_another_thread_is_still_importing_is_waited_for():
    thread = threading.Thread(target=importlib.import_module, args=("hostileapp.slow",))
    thread.start()
    while "hostileapp.slow" not in sys.modules:
        time.sleep(0.001)
    assert repr(loads('{"$":"exc","c":"hostileapp.slow:Declined","a":["x"]}')) == "Declined('x')"
    thread.join()


@pytest.mark.usefixtures("unloaded_app_modules")
def test_a_module_that_cannot_be_imported_is_named():
    problem = refused('{"$":"exc","c":"hostileapp.broken:Declined","a":["x"]}').problem
    assert "hostileapp.broken" in problem
    assert "ZeroDivisionError" in problem


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nonsense",
        "NaN",
        "[Infinity]",
        "[-Infinity]",
        '{"a":NaN}',
        "1 2",
        "'x'",
        "9" * 5000,
        '"\x01"',
        '{"$":"unknown","v":1}',
        '{"$":null}',
        '{"$":["tuple"]}',
        '{"$":{"$":"tuple","v":[]}}',
        '{"$":"tuple"}',
        '{"$":"tuple","v":"ab"}',
        '{"$":"tuple","v":{"$":"set","v":[]}}',
        '{"$":"set","v":[[]]}',
        '{"$":"set","v":[1,1]}',
        '{"$":"frozenset","v":[{}]}',
        '{"$":"dict","v":[[1]]}',
        '{"$":"dict","v":[[[],1]]}',
        '{"$":"dict","v":[[1,2],[1,3]]}',
        '{"$":"dict","v":["ab"]}',
        '{"$":"int","v":"xyz"}',
        '{"$":"int","v":5}',
        '{"$":"float","v":"many"}',
        '{"$":"str","v":[1]}',
        '{"$":"bytes","v":"*"}',
        '{"$":"bytes","v":"é"}',
        '{"$":"decimal","v":"1,5"}',
        '{"$":"uuid","v":"1"}',
        '{"$":"date","v":"2024-02-30"}',
        '{"$":"datetime","v":"soon"}',
        '{"$":"datetime","v":"2024-01-01T00:00:00","tz":"UTC"}',
        '{"$":"datetime","v":"2024-01-01T00:00:00","fold":7}',
        '{"$":"time","v":"25:00"}',
        '{"$":"timedelta","v":[1e300,0,0]}',
        '{"$":"timedelta","v":["a",0,0]}',
        '{"$":"timedelta","v":[1]}',
        '{"$":"offset","v":1e300}',
        '{"$":"offset","v":86400}',
        '{"$":"zone","v":"../../../etc/passwd"}',
        '{"$":"zone","v":"/etc/passwd"}',
        '{"$":"zone","v":"Europe"}',
        '{"$":"exc","c":"builtins:ValueError","a":"x"}',
        '{"$":"exc","c":"builtins:UnicodeDecodeError","a":[1]}',
        '{"$":"exc","c":"builtins:ValueError","a":[],"s":{"nothing":1}}',
        '{"$":"exc","c":"builtins:ValueError","a":[],"d":5}',
        '{"$":"exc","c":"builtins:ValueError","a":[],"cause":5}',
        '{"$":"exc","c":"builtins:OSError","a":[2,"x"]}',
        '{"$":"exc","c":"builtins:ExceptionGroup","a":["x",[]]}',
        '{"$":"dataclass","c":"tests.serialization.samples:Frozen","v":{"name":1,"tags":2},"x":{"other":1}}',
        '{"$":"dataclass","c":"tests.serialization.samples:ListWithFields","v":{"note":1}}',
        '{"$":"dataclass","c":"tests.serialization.samples:Point","v":[1,2]}',
        '{"$":"dataclass","c":"tests.serialization.samples:DataError","v":{"code":1,"reason":2}}',
        '{"$":"enum","c":"tests.serialization.samples:Colour","v":1}',
        '{"$":"enum","c":"tests.serialization.samples:Colour","v":"_missing_"}',
        '{"$":"enum","c":"tests.serialization.samples:Colour","v":[]}',
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"$":"tuple","v":[' * 50_000 + "]}" * 50_000,
    ],
    ids=count(),
)
def test_malformed_text_is_a_clear_error(text, calls):
    error = refused(text)
    assert "stored" in error.problem
    assert len(error.problem) < 1000
    error.problem.encode()
    assert not calls


@pytest.mark.parametrize("text", [None, b"null", 1, {}])
def test_what_is_no_text_is_a_clear_error(text):
    with pytest.raises(SerializationError, match="not a str"):
        loads(text)


@pytest.mark.parametrize("key", ["os", "os/path", "antigravity/x", "Nowhere/At_all"])
def test_an_unknown_zone_imports_nothing(key, audited):
    loads('{"$":"zone","v":"UTC"}')
    refused(json.dumps({"$": "zone", "v": "Nowhere"}))  # the list of all zones is made once
    audited.clear()
    refused(json.dumps({"$": "zone", "v": key}))
    assert not audited


@pytest.mark.parametrize("key", ["../zoneinfo/UTC", "/etc/hostname", "//server/share", "C:/x", "a\\b", "UTC\0"])
def test_a_zone_never_looks_for_a_file_elsewhere(key, monkeypatch):
    monkeypatch.setattr(values.Path, "is_file", lambda path: pytest.fail(f"looked for {path}"))
    refused(json.dumps({"$": "zone", "v": key}))


KINDS = sorted(set(types._decoders) - {"model"})  # these would ask the database


def tags(inner):
    names = [
        f"tests.serialization.samples:{name}"
        for name in ("Colour", "Access", "Point", "Frozen", "CardDeclined", "Needs")
    ]
    return st.fixed_dictionaries(
        {"$": st.sampled_from(KINDS), "v": inner},
        optional={
            "c": st.sampled_from([*names, "builtins:OSError", "builtins:ExceptionGroup", "os:system"]),
            "a": st.lists(inner, max_size=3),
            "d": inner,
            "s": inner,
            "x": inner,
            "tz": inner,
            "fold": inner,
            "name": inner,
            "self": inner,
            "cause": inner,
        },
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3) | tags(inner),
    max_leaves=10,
)


@settings(max_examples=500, deadline=None)
@given(json_values)
def test_any_json_is_a_value_or_a_clear_error(tree):
    samples.calls.clear()
    try:
        value = loads(json.dumps(tree))
    except SerializationError:
        pass
    else:
        dumps(value)
    assert not samples.calls
