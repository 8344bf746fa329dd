// NVRTC without a GPU: the functions of libnvrtc that `cuda/nvrtc.rs` calls. What it makes of NAME.cu is the text that the
// emulated driver (driver.cpp) takes for that file. For tests alone; compiled as a shared library of that name.
//
// What it holds callers to:
// - A program has a source with something in it, and one text and one name for each header.
// - Options are a standard and an architecture that NVRTC of this version has code for; anything else is an invalid option, with a
//   line in the log that names it.
// - What is included in quotes is among the headers. Nothing else of the source is read.
// - Code is asked for after it was made; programs are destroyed once.
// Programs that were compiled are counted (`emulated_nvrtc_compiled`), so that a test sees what came from a cache.
#include <cstddef>
#include <cstring>
#include <map>
#include <set>
#include <string>

namespace {

// Results, as nvrtc.h numbers them.
enum Result : int {
    SUCCESS = 0,
    INVALID_INPUT = 3,
    INVALID_PROGRAM = 4,
    INVALID_OPTION = 5,
    COMPILATION = 6,
};

constexpr int MAJOR = 12, MINOR = 0;
// Those of CUDA 12.0.
const char* const TARGETS[] = {"sm_50", "sm_52", "sm_53", "sm_60", "sm_61", "sm_62", "sm_70",
                               "sm_72", "sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90"};

struct Program {
    std::string source, name, log, code;
    std::map<std::string, std::string> headers;
    bool compiled = false;
};

std::set<const void*>& programs() {
    static std::set<const void*> all;
    return all;
}
size_t compiled_programs = 0;
Program* of(void* program) { return programs().count(program) ? static_cast<Program*>(program) : nullptr; }

// Whether the text begins so; moves behind it.
bool take(std::string& text, const std::string& before) {
    if (text.compare(0, before.size(), before) != 0) return false;
    text.erase(0, before.size());
    return true;
}

bool known(std::string option) {
    if (take(option, "--std=")) return option == "c++17" || option == "c++20";
    if (take(option, "--gpu-architecture="))
        for (const char* target : TARGETS)
            if (option == target) return true;
    return false;
}

// Whether all that the text includes is there; the log says what is not, and who wants it. What is in `seen` has been read.
bool complete(Program& program, const std::string& name, const std::string& text, std::set<std::string>& seen) {
    const std::string include = "#include \"";
    for (size_t at = text.find(include); at != std::string::npos; at = text.find(include, at)) {
        at += include.size();
        const std::string wanted = text.substr(at, text.find('"', at) - at);
        // What only the emulation includes, which no compiler for GPUs sees.
        if (wanted == "emulate/device.h" || !seen.insert(wanted).second) continue;
        const auto found = program.headers.find(wanted);
        if (found == program.headers.end()) {
            program.log = name + ": catastrophic error: cannot open source file \"" + wanted + "\"\n";
            return false;
        }
        if (!complete(program, wanted, found->second, seen)) return false;
    }
    return true;
}

// Sizes count the zero behind a text.
int give(const std::string& text, size_t* size) {
    if (!size) return INVALID_INPUT;
    *size = text.size() + 1;
    return SUCCESS;
}
int give(const std::string& text, char* to) {
    if (!to) return INVALID_INPUT;
    std::memcpy(to, text.c_str(), text.size() + 1);
    return SUCCESS;
}
template <class T>
int give_code(void* program, T* to) {
    const Program* asked = of(program);
    return asked && asked->compiled ? give(asked->code, to) : INVALID_PROGRAM;
}
template <class T>
int give_log(void* program, T* to) {
    const Program* asked = of(program);
    return asked ? give(asked->log, to) : INVALID_PROGRAM;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API size_t emulated_nvrtc_compiled() { return compiled_programs; }

API int nvrtcVersion(int* major, int* minor) {
    if (!major || !minor) return INVALID_INPUT;
    *major = MAJOR;
    *minor = MINOR;
    return SUCCESS;
}
API const char* nvrtcGetErrorString(int result) {
    switch (result) {
        case SUCCESS: return "NVRTC_SUCCESS";
        case INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
        case INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
        case INVALID_OPTION: return "NVRTC_ERROR_INVALID_OPTION";
        case COMPILATION: return "NVRTC_ERROR_COMPILATION";
        default: return "NVRTC_ERROR unknown";
    }
}

API int nvrtcCreateProgram(void** program, const char* source, const char* name, int headers, const char* const* texts,
                           const char* const* names) {
    if (!program || !source || !*source || headers < 0 || (headers && (!texts || !names))) return INVALID_INPUT;
    auto* made = new Program;
    made->source = source;
    made->name = name && *name ? name : "default_program";
    for (int i = 0; i < headers; ++i) made->headers[names[i]] = texts[i];
    programs().insert(made);
    *program = made;
    return SUCCESS;
}
API int nvrtcDestroyProgram(void** program) {
    if (!program || !programs().erase(*program)) return INVALID_PROGRAM;
    delete static_cast<Program*>(*program);
    *program = nullptr;
    return SUCCESS;
}
API int nvrtcCompileProgram(void* program, int count, const char* const* options) {
    Program* made = of(program);
    if (!made) return INVALID_PROGRAM;
    if (count < 0 || (count && !options)) return INVALID_INPUT;
    made->compiled = false;
    made->log.clear();
    for (int i = 0; i < count; ++i)
        if (!known(options[i])) {
            const std::string option = options[i];
            const std::string key = option.substr(0, option.find('='));
            made->log = key == "--gpu-architecture" ? "nvrtc: error: invalid value for --gpu-architecture (-arch)\n"
                                                    : "nvrtc: error: unrecognized option " + option + " found\n";
            return INVALID_OPTION;
        }
    std::set<std::string> seen;
    if (!complete(*made, made->name, made->source, seen)) return COMPILATION;
    made->code = "emulated device: " + made->name.substr(0, made->name.rfind(".cu"));
    made->compiled = true;
    ++compiled_programs;
    return SUCCESS;
}
API int nvrtcGetProgramLogSize(void* program, size_t* size) { return give_log(program, size); }
API int nvrtcGetProgramLog(void* program, char* log) { return give_log(program, log); }
API int nvrtcGetCUBINSize(void* program, size_t* size) { return give_code(program, size); }
API int nvrtcGetCUBIN(void* program, char* code) { return give_code(program, code); }
