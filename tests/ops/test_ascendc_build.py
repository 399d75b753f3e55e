"""How the AscendC operators are built: what is said to be missing, and that kernels use nothing but CANN's header and their own."""

import os
import re
import subprocess
import sys

import pytest

from ops.ascendc import build


def test_every_operator_has_a_definition_and_a_kernel_of_its_name():
    for family, names in build.families().items():
        source = (build.HOST / f"{family}.cpp").read_text()
        assert names and set(re.findall(r"OP_ADD\((\w+)\)", source)) == set(map(build.type_of, names)), family
        assert set(re.findall(r"REGISTER_TILING_DATA_CLASS\((\w+),", source)) == set(map(build.type_of, names)), family
        for name in names:
            kernel = (build.KERNEL / f"{name}.cpp").read_text()
            inputs = re.search(rf"void {name}\((.*?)\) \{{", kernel, re.S)[1]
            assert inputs.split()[-1] == "tiling" and inputs.split()[-3] == "workspace,", name
            ports = re.search(rf"class {build.type_of(name)} .*?Declare\(\*this,(.*?),\s+optiling::", source, re.S)[1]
            assert re.findall(r'\{"(\w+)"', ports) == re.findall(r"GM_ADDR (\w+)", inputs)[:-2], name


def test_kernels_use_cann_s_header_and_their_own_alone():
    own = {path.name for path in build.KERNEL.glob("*.h")}
    for path in build.KERNEL.iterdir():
        text = re.sub(r"//.*", "", path.read_text())
        assert set(re.findall(r"#include [<\"](.*?)[>\"]", text)) <= own | {"kernel_operator.h"}, path
        assert not re.search(r"std::|emulat|EMULAT|\b(printf|malloc|new|throw|expf?|sqrtf?|logf?)\b\s*\(", text), path
        if path.suffix == ".h" and re.search(r"^(class|struct|constexpr|__aicore__)", text, re.M):
            assert re.search(r"^namespace qwen \{.*^\}", text, re.M | re.S), path  # beside CANN's names, not among them


@pytest.mark.slow
@pytest.mark.parametrize(
    "line, words",
    [
        ("void f(uint32_t &n) { if (ASCEND_IS_AIC) n = 1; }", "expected"),
        ("uint32_t AlignUp(uint32_t n, uint32_t to) { return n / to * to; } uint32_t f() { return AlignUp(3, 8); }", "ambiguous"),
        ("void f(TQue<TPosition::VECIN, 1> &queue) { queue.FreeTensor(queue.DeQue<float>()); }", "cannot bind non-const"),
    ],
)
def test_what_a_device_compiler_would_refuse_does_not_compile(line, words):
    head = '#include "kernel_operator.h"\nusing namespace AscendC;\n'
    build.built("taken", f"{head}void f(uint32_t &n) {{ if ASCEND_IS_AIC n = 1; }}\n", ())
    with pytest.raises(RuntimeError, match=words):
        build.built("refused", f"{head}{line}\n", ())


def test_definitions_use_cann_s_headers_and_their_own_alone():
    cann = {"register/op_def_registry.h", "register/tilingdata_base.h", "tiling/platform/platform_ascendc.h"}
    own, standard = {path.name for path in build.HOST.glob("*.h")}, {"algorithm", "cstdint", "cstdio", "initializer_list"}
    for path in build.HOST.iterdir():
        assert set(re.findall(r"#include [<\"](.*?)[>\"]", path.read_text())) <= own | cann | standard, path


def test_what_is_missing_to_build_the_package_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "none"))
    assert "install its toolkit, and source its set_env.sh" in build.missing("package")
    with pytest.raises(RuntimeError, match="CANN is not in"):
        build.install(tmp_path / "package")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    lacks = r"CANN in .* lacks the compiler of kernels \(compiler/ccec_compiler/bin/ccec or bin/ccec\), the AscendC headers \("
    assert re.search(lacks, build.missing("package"))


@pytest.mark.parametrize(
    "file, text, found",
    [
        ("x86_64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.2.RC1\n", "8.2"),
        ("version.cfg", "# of the toolkit\nruntime_running_version=[7.7.0.1:9.2.0]\n", "7.7.0.1"),
        ("compiler/version.info", "Version=9.1.0\n", "9.1.0"),
        ("compiler/version.info", "Version=9.0\n", "9.0"),
    ],
)
def test_another_version_of_cann_is_refused(tmp_path, monkeypatch, file, text, found):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert build.version() == "" and "written for" not in build.missing("package")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    assert build.version() == found
    words = f"CANN in {tmp_path} is {found}, and the kernels are written for 9.0 and 9.1; install one of these"
    assert (words in build.missing("package")) == (not found.startswith("9."))


def test_where_the_package_is_installed_is_asked_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MS_SIMULATION_LEVEL", raising=False)
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", f"/opt/other:{tmp_path / 'vendors' / build.VENDOR}")
    assert "names no folder vendors/qwen3" in build.not_installed()
    (tmp_path / "vendors" / build.VENDOR).mkdir(parents=True)
    assert build.not_installed() == ""


@pytest.mark.slow
def test_the_command_builds_what_can_be_built():
    done = subprocess.run([sys.executable, "-m", "ops.ascendc.build"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-3]] == list(build.families())
    assert [line.split(": ")[0] for line in lines[-3:]] == ["CANN's CPU mode", "CANN's simulator", "package for Ascend"]


@pytest.mark.slow
@pytest.mark.skipif(build.missing("package") != "", reason=build.missing("package"))
def test_cann_builds_the_package(tmp_path):
    assert os.path.isdir(build.install(tmp_path))
