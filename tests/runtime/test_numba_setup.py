"""Where compiled code is kept: in a folder that only this user can write to, another one for other kernels."""

import os
import subprocess
import sys

import pytest

from llama_hpc.runtime import numba_setup
from llama_hpc.runtime.numba_setup import cache_folder


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The folder of this user in a temporary directory of its own; it does not exist yet."""
    monkeypatch.setattr(numba_setup.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"llama_hpc-{os.getuid()}"


def test_the_folder_is_private_and_stays(base):
    folder = cache_folder()
    assert folder.is_dir() and folder.parent == base
    assert base.stat().st_mode & 0o777 == 0o700
    (folder / "compiled").touch()
    assert cache_folder() == folder and (folder / "compiled").exists()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_can_write_to_is_not_used(base, mode):
    base.mkdir()
    base.chmod(mode)
    assert cache_folder() is None


def test_a_folder_of_another_user_is_not_used(base, monkeypatch):
    """Seen from a user whose folder somebody else made first."""
    other = os.getuid() + 1
    (base.parent / f"llama_hpc-{other}").mkdir(mode=0o700)
    monkeypatch.setattr(numba_setup.os, "getuid", lambda: other)
    assert cache_folder() is None


def test_a_link_is_not_followed(base, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    base.symlink_to(tmp_path / "elsewhere")
    assert cache_folder() is None
    assert not any((tmp_path / "elsewhere").iterdir())


def test_where_no_folder_can_be_made_there_is_none(base):
    base.write_text("a file")
    assert cache_folder() is None


@pytest.fixture
def package(tmp_path, base, monkeypatch):
    """A copy of the package's layout: two kernels, one of them in a subfolder."""
    kernels = tmp_path / "llama_hpc" / "kernels"
    (kernels / "cpu").mkdir(parents=True)
    (kernels / "numerics.py").write_text("LIMIT = 1\n")
    (kernels / "cpu" / "matmul.py").write_text("from ..numerics import LIMIT\n")
    monkeypatch.setattr(numba_setup, "__file__", str(tmp_path / "llama_hpc" / "runtime" / "numba_setup.py"))
    return tmp_path / "llama_hpc"


@pytest.mark.parametrize("source", ["numerics.py", "cpu/matmul.py", "cpu/new.py"])
def test_a_changed_source_has_another_folder(package, source):
    before = cache_folder()
    (package / "kernels" / "notes.txt").write_text("no source")
    assert cache_folder() == before
    path = package / "kernels" / source
    text = path.read_text() if path.exists() else ""
    path.write_text(text + "LIMIT = 2\n")
    assert cache_folder() != before
    path.write_text(text)
    if text:
        assert cache_folder() == before


def test_sources_behind_a_link_count(package):
    """As in a checkout, where llama_hpc/kernels is a link to ../kernels."""
    before = cache_folder()
    real = (package / "kernels").rename(package.parent / "kernels")
    (package / "kernels").symlink_to("../kernels")
    assert cache_folder() == before
    (real / "numerics.py").write_text("LIMIT = 3\n")
    assert cache_folder() != before


def test_a_chosen_instruction_set_has_another_folder(base, monkeypatch):
    """Its code differs, while Numba sees the same processor."""
    monkeypatch.delenv("LLAMA_HPC_KERNELS", raising=False)
    folders = {cache_folder()}
    for name in ("avx2", "generic"):
        monkeypatch.setenv("LLAMA_HPC_KERNELS", name)
        folders.add(cache_folder())
    assert len(folders) == 3


def test_another_processor_or_compiler_has_another_folder(base, monkeypatch):
    """Nodes that differ may share the disk."""
    folders = {cache_folder()}
    monkeypatch.setenv("NUMBA_CPU_NAME", "skylake-avx512")
    folders.add(cache_folder())
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+avx2")
    folders.add(cache_folder())
    monkeypatch.setattr(numba_setup, "version", lambda package: "9.9")
    folders.add(cache_folder())
    assert len(folders) == 4


def configured(code, **variables):
    """What a fresh process prints after numba_setup.configure(3) and ``code``."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "OMP_", "LLAMA_HPC_"))} | variables
    program = f"import os, sys\nfrom llama_hpc.runtime import numba_setup\n{code}\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.split()


def test_numba_takes_the_settings(tmp_path):
    code = "numba_setup.configure(3)\nfrom numba import config\nprint(config.NUMBA_NUM_THREADS, config.CACHE_DIR)"
    threads, folder = configured(code, TMPDIR=str(tmp_path))
    assert threads == "3"
    assert folder.startswith(str(tmp_path / f"llama_hpc-{os.getuid()}" / "numba-"))


def test_waiting_threads_sleep_unless_the_user_says_otherwise():
    code = "numba_setup.configure(3)\nprint(os.environ['OMP_WAIT_POLICY'])"
    assert configured(code) == ["passive"]
    assert configured(code, OMP_WAIT_POLICY="active") == ["active"]


def test_a_folder_that_the_user_names_holds_one_for_each_choice_of_kernels(tmp_path):
    """A process started by one that has been configured goes on with its folder."""
    code = "numba_setup.configure(3)\nprint(os.environ['NUMBA_CACHE_DIR'])"
    (usual,), (chosen,) = configured(code, NUMBA_CACHE_DIR=str(tmp_path)), configured(code, NUMBA_CACHE_DIR=str(tmp_path),
                                                                                      LLAMA_HPC_KERNELS="generic")
    assert usual != chosen and os.path.dirname(usual) == os.path.dirname(chosen) == str(tmp_path)
    assert configured(code, NUMBA_CACHE_DIR=usual) == [usual]
