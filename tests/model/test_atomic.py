"""Files that are written whole or not at all."""

import errno

import pytest
from small import make

from hydravit.atomic import atomic_write
from hydravit.checkpoint import save_checkpoint


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("zip"), KeyError("x")]
)
def test_a_failing_writer_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "file"
    path.write_text("old")

    def writer(file):
        file.write_text("half of the ne")
        raise failure

    with pytest.raises(KeyError if isinstance(failure, KeyError) else OSError) as caught:
        atomic_write(path, writer)
    if not isinstance(failure, KeyError):
        assert str(path) in str(caught.value) and caught.value.__cause__ is failure
        assert caught.value.errno == getattr(failure, "errno", None)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_atomic_write_keeps_links_and_usual_permissions(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    atomic_write(tmp_path / "link", lambda file: file.write_text("new"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    (tmp_path / "plain").write_text("")
    save_checkpoint(tmp_path / "a.safetensors", make())
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
