// The parsed text of a PTX module (PTX ISA 9.0). decode.cpp turns it into the program that is executed.
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
    std::string text;      // a register, variable, label or function; of an address: its base, or empty
    int64_t value = 0;     // an integer; of an address: the offset; of float32 and float64: the bits
    bool negated = false;  // !%p
    bool lane_predicate = false;  // the second of a pair %r1|%p1
    std::vector<Operand> parts;   // the elements of a vector, or of a list in parentheses
};

// The place in the CUDA source that a statement comes from, as .loc gives it.
struct SourceLine {
    int file = 0, line = 0;                // 0: unknown
    int caller_file = 0, caller_line = 0;  // the call, if it comes from an inlined function
};

// The state space of a variable.
enum class Space : uint8_t { generic, global, constant, shared, local, param };

struct VariableDeclaration {
    Space space;
    std::string name, type;  // "b8"
    int align = 0;           // 0: the alignment of the type
    int64_t count = 1;       // the number of elements; 0 for the [] of dynamic shared memory
    bool is_extern = false, is_managed = false;
    struct Value {  // an initialiser, or the address of a variable plus an offset
        uint64_t bits = 0;
        std::string symbol;
        bool generic_address = false;
        int mask_shift = -1;  // 0xFF(symbol) is one byte of the address: how far it is shifted
    };
    std::vector<Value> values;
};

struct Statement {
    enum Kind { instruction, label, registers, variable, open, close, targets } kind;
    int ptx_line = 0;
    SourceLine source;
    // An instruction is "add" with the modifiers {"rn", "f32"}. Registers are their type, with their name as
    // the only operand.
    std::string op;
    std::vector<std::string> modifiers;
    std::string guard;  // a predicate register, or empty
    bool guard_negated = false;
    std::vector<Operand> operands;
    int count = 0;  // registers: %r<count>, or 0 for a single one
    VariableDeclaration declaration;
};

struct FunctionText {
    std::string name;
    bool is_entry = false, is_declaration = false;
    int ptx_line = 0;
    int max_threads = 0;  // the product of the dimensions in .maxntid or .reqntid; 0: not given
    bool required_threads = false;
    std::vector<VariableDeclaration> results, parameters;
    std::vector<Statement> body;
    std::string_view unparsed;  // the body of an entry, until parse_body() parses it
    int unparsed_line = 0;
};

struct ModuleText {
    std::string name;
    std::map<int, std::string> files;
    std::vector<VariableDeclaration> variables;
    std::map<std::string, FunctionText> functions;
};

// Throws a std::runtime_error: "name:line: what was not understood". Leaves the bodies of entries, which are
// nearly all of the text, to parse_body(), so `ptx` must stay in memory.
ModuleText parse(std::string_view ptx, const std::string& name);
void parse_body(const ModuleText& module, FunctionText* entry);

int type_bytes(const std::string& type);  // "u32" -> 4, "pred" -> 1; 0 if it is not a type

}  // namespace ptxsim
