// PTX as it is written (PTX ISA 9.0): what the parser makes of a module's text. decode.cpp turns it into what
// is executed.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace ptxsim {

struct Operand {
    enum Kind { name, integer, float32, float64, address, vector, ignored } kind = name;
    std::string text;      // name: of a register, variable, label or function; address: its base, or empty
    int64_t value = 0;     // integer; address: the offset; float32 and float64: the bits
    bool negated = false;  // !%p
    bool lane_predicate = false;  // the second of a pair %r1|%p1
    std::vector<Operand> parts;   // vector; a list in parentheses
};

// Where a statement comes from: the CUDA source, by .loc.
struct SourceLine {
    int file = 0, line = 0;                // 0: not known
    int caller_file = 0, caller_line = 0;  // where an inlined function was called
};

// The state space of a variable.
enum class Space : uint8_t { generic, global, constant, shared, local, param };

struct VariableDeclaration {
    Space space;
    std::string name, type;  // "b8"
    int align = 0;           // 0: that of the type
    int64_t count = 1;       // elements; 0 for the [] of dynamic shared memory
    bool is_extern = false, is_managed = false;
    struct Value {  // an initialiser, or the address of a variable plus an offset
        uint64_t bits = 0;
        std::string symbol;
        bool generic_address = false;
        int mask_shift = -1;  // of 0xFF(symbol): the byte of the address
    };
    std::vector<Value> values;
};

struct Statement {
    enum Kind { instruction, label, registers, variable, open, close, targets } kind;
    int ptx_line = 0;
    SourceLine source;
    // instruction: "add", {"rn", "f32"}; registers: the type, and the name as the only operand
    std::string op;
    std::vector<std::string> modifiers;
    std::string guard;  // a predicate register, or empty
    bool guard_negated = false;
    std::vector<Operand> operands;
    int count = 0;  // registers: %r<count>, or 0 for one name
    VariableDeclaration declaration;
};

struct FunctionText {
    std::string name;
    bool is_entry = false, is_declaration = false;
    int ptx_line = 0;
    int max_threads = 0;  // .maxntid or .reqntid, all dimensions; 0: not given
    bool required_threads = false;
    std::vector<VariableDeclaration> results, parameters;
    std::vector<Statement> body;
    std::string_view unparsed;  // of an entry, the body until parse_body()
    int unparsed_line = 0;
};

struct ModuleText {
    std::string name;
    std::map<int, std::string> files;
    std::vector<VariableDeclaration> variables;
    std::map<std::string, FunctionText> functions;
};

// Throws std::runtime_error: "name:line: what was not understood". The bodies of entries, which are nearly
// all of the text, are left for parse_body(), so `ptx` must stay.
ModuleText parse(std::string_view ptx, const std::string& name);
void parse_body(const ModuleText& module, FunctionText* entry);

int type_bytes(const std::string& type);  // "u32" -> 4, "pred" -> 1; 0 for what is no type

}  // namespace ptxsim
