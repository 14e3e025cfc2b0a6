// The Python module mint_engine._native: picks an ISA and exposes each op of ops.h as one function.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "scratch.h"
#include "table.h"

namespace py = pybind11;

namespace mint {
namespace {

#if defined(__x86_64__)
// Whether the CPU multiplies bf16 tiles and the kernel lets this process use them (Linux asks to be asked).
bool amx() {
#if defined(__linux__)
    constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;  // CPUID 7.0, EDX
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kBf16)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return permitted;
#else
    return false;
#endif
}
#endif

std::vector<const Table*> available() {  // best first
    std::vector<const Table*> tables;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (avx512_bf16 && amx()) tables.push_back(&table_amx);
    if (avx512_bf16) tables.push_back(&table_avx512_bf16);
    if (avx512) tables.push_back(&table_avx512);
    if (avx2) tables.push_back(&table_avx2);
#endif
    tables.push_back(&table_scalar);
    return tables;
}

const Table* current = available().front();

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Table* t : available()) names.emplace_back(t->isa);
    return names;
}

void set_isa(const std::string& name) {
    std::string known;
    for (const Table* t : available()) {
        if (name == t->isa) {
            current = t;
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(t->isa);
    }
    throw std::invalid_argument("name: expected one of " + known + " on this CPU, got " + name + " (set_isa)");
}

// Pointers cross from Python as integers.
template <class A>
using Py = std::conditional_t<std::is_pointer_v<A>, uintptr_t, A>;

template <class A>
A from_py(Py<A> a) {
    if constexpr (std::is_pointer_v<A>) {
        return reinterpret_cast<A>(a);
    } else {
        return a;
    }
}

template <class... A, class... B>
void def(py::module_& m, const char* name, void (*Table::*f32)(A...), void (*Table::*b16)(B...)) {
    m.def(name, [=](int dtype, Py<A>... a) {
        if (dtype != 0 && dtype != 1) throw std::invalid_argument("dtype: expected 0 (float32) or 1 (bfloat16)");
        const Table* table = current;
        py::gil_scoped_release release;
        if (dtype == 0) {
            (table->*f32)(from_py<A>(a)...);
        } else {
            (table->*b16)(from_py<B>(a)...);
        }
    });
}

}  // namespace
}  // namespace mint

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of mint_engine. Raw addresses in: call them through mint_engine.kernels.";
    m.def("isa", [] { return std::string(mint::current->isa); }, "The instruction set in use.");
    m.def("isas", &mint::isas, "The instruction sets this CPU can run, best first.");
    m.def("set_isa", &mint::set_isa, "Use another of isas(); raises ValueError for one this CPU lacks.");
    m.def(
        "one_thread", [] { omp_set_num_threads(1); },
        "From now on OpenMP regions that the calling thread begins have no team.");
    m.def(
        "dismiss_team", [] { return omp_pause_resource(omp_pause_soft, omp_get_initial_device()) == 0; },
        "End the idle threads of the calling thread's OpenMP team; False inside a parallel region.");
    m.def("fail_scratch", &mint::fail_scratch,
          "For tests: after `good` more requests for scratch memory the next `bad` ones raise MemoryError.",
          py::arg("good"), py::arg("bad"));
#define MINT_DEF(op) mint::def(m, #op, &mint::Table::op##_f32, &mint::Table::op##_bf16);
    MINT_OPS(MINT_DEF)
#undef MINT_DEF
}
