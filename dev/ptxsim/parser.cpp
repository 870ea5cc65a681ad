#include <algorithm>
#include <cctype>
#include <cstring>
#include <stdexcept>
#include <string_view>

#include "dev/ptxsim/ptx.h"

namespace ptxsim {

int type_bytes(const std::string& type) {
    static const std::map<std::string, int> bytes = {
        {"pred", 1}, {"b8", 1},   {"u8", 1},  {"s8", 1},  {"b16", 2},   {"u16", 2},    {"s16", 2},
        {"f16", 2},  {"bf16", 2}, {"b32", 4}, {"u32", 4}, {"s32", 4},   {"f32", 4},    {"tf32", 4},
        {"b64", 8},  {"u64", 8},  {"s64", 8}, {"f64", 8}, {"f16x2", 4}, {"bf16x2", 4}, {"b128", 16},
    };
    auto it = bytes.find(type);
    return it == bytes.end() ? 0 : it->second;
}

namespace {

struct Token {
    enum Kind { word, number, string, punctuation, body, end } kind;
    std::string_view text;
    int line;
};

bool is_word(char c) {
    return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.';
}

// The position after the closing brace that belongs to the brace at text[0].
size_t end_of_body(std::string_view text) {
    int depth = 0;
    for (size_t i = 0; i < text.size(); i++) {
        depth += (text[i] == '{') - (text[i] == '}');
        if (depth == 0) return i + 1;
    }
    return text.size();
}

// A word may contain dots: "ld.global.f32", ".reg", "%tid.x". A negative number is two tokens. The whole body
// of an entry is one token.
std::vector<Token> tokenize(std::string_view text, int line) {
    std::vector<Token> tokens;
    bool in_entry = false;
    for (size_t i = 0; i < text.size();) {
        char c = text[i];
        size_t start = i;
        if (c == '\n') line++;
        if (isspace((unsigned char)c) || c == 0) {
            i++;
        } else if (text.substr(i, 2) == "//") {
            i = std::min(text.find('\n', i), text.size());
        } else if (text.substr(i, 2) == "/*") {
            size_t end = std::min(text.find("*/", i), text.size());
            for (; i < end; i++) line += text[i] == '\n';
            i = std::min(end + 2, text.size());
        } else if (c == '{' && in_entry) {
            in_entry = false;
            i += end_of_body(text.substr(i));
            tokens.push_back({Token::body, text.substr(start, i - start), line});
            line += (int)std::count(text.begin() + start, text.begin() + i, '\n');
        } else if (c == '"') {
            for (i++; i < text.size() && text[i] != '"'; i++) line += text[i] == '\n';
            i++;
            tokens.push_back({Token::string, text.substr(start + 1, i - start - 2), line});
        } else if (isdigit((unsigned char)c)) {
            while (i < text.size() && (isalnum((unsigned char)text[i]) || text[i] == '.' ||
                                       ((text[i] == '+' || text[i] == '-') && (text[i - 1] == 'e') &&
                                        text.substr(start, 2) != "0x" && text.substr(start, 2) != "0f" &&
                                        text.substr(start, 2) != "0d")))
                i++;
            tokens.push_back({Token::number, text.substr(start, i - start), line});
        } else if (is_word(c)) {  // a directive ends at the next dot: ".reg.b16" is two tokens
            i++;
            while (i < text.size() && (is_word(text[i]) || text.substr(i, 2) == "::") &&
                   !(c == '.' && text[i] == '.'))
                i += text[i] == ':' ? 2 : 1;
            tokens.push_back({Token::word, text.substr(start, i - start), line});
            in_entry |= tokens.back().text == ".entry";
        } else {
            i++;
            tokens.push_back({Token::punctuation, text.substr(start, 1), line});
        }
    }
    tokens.push_back({Token::end, "", line});
    return tokens;
}

class Parser {
  public:
    Parser(std::string_view text, const std::string& name, int line = 1) : tokens_(tokenize(text, line)) {
        module_.name = name;
    }

    ModuleText run() {
        while (now().kind != Token::end) top_level();
        return std::move(module_);
    }

    void body(FunctionText& f) {
        expect("{");
        source_ = {};
        for (int depth = 1; depth > 0;) {
            Statement s;
            s.ptx_line = now().line;
            s.source = source_;
            if (accept("{")) {
                depth++;
                s.kind = Statement::open;
            } else if (accept("}")) {
                depth--;
                s.kind = Statement::close;
            } else if (accept(".loc")) {
                location();
                continue;
            } else if (is(".reg")) {
                registers(f);
                continue;
            } else if (is(".local") || is(".shared") || is(".param") || is(".const") || is(".global")) {
                for (VariableDeclaration& v : variables()) {
                    s.kind = Statement::variable;
                    s.declaration = std::move(v);
                    f.body.push_back(s);
                }
                continue;
            } else if (is(".pragma")) {
                while (!accept(";")) next();
                continue;
            } else if (now().kind == Token::word && tokens_[at_ + 1].text == ":") {
                s.op = word();
                expect(":");
                s.kind = Statement::label;
                if (accept(".branchtargets")) {
                    s.kind = Statement::targets;
                    do {
                        Operand o;
                        o.text = word();
                        s.operands.push_back(o);
                    } while (accept(","));
                    expect(";");
                } else if (is(".callprototype")) {
                    while (!accept(";")) next();
                    continue;
                }
            } else if (accept(";")) {
                continue;
            } else {
                instruction(s);
            }
            f.body.push_back(std::move(s));
        }
        f.body.pop_back();  // the closing brace of the function is not a statement
    }

  private:
    std::vector<Token> tokens_;
    size_t at_ = 0;
    ModuleText module_;
    SourceLine source_;

    const Token& now() const { return tokens_[at_]; }
    bool is(std::string_view text) const { return now().text == text && now().kind != Token::string; }
    bool accept(std::string_view text) {
        if (!is(text)) return false;
        at_++;
        return true;
    }
    Token next() {
        if (now().kind == Token::end) fail("more text");
        return tokens_[at_++];
    }
    void expect(std::string_view text) {
        if (!accept(text)) fail("'" + std::string(text) + "'");
    }
    [[noreturn]] void fail(const std::string& expected) const {
        throw std::runtime_error(module_.name + ":" + std::to_string(now().line) + ": expected " + expected +
                                 ", found '" + std::string(now().text) + "'");
    }
    std::string word() {
        if (now().kind != Token::word) fail("a name");
        return std::string(next().text);
    }

    // An integer, which may have a sign, a prefix (0x, 0b, 0 for octal) and a U at its end.
    int64_t integer() {
        bool negative = accept("-");
        if (now().kind != Token::number) fail("a number");
        std::string text(next().text);
        while (!text.empty() && (text.back() == 'U' || text.back() == 'u')) text.pop_back();
        int base = 10;
        const char* digits = text.c_str();
        if (text.size() > 1 && digits[0] == '0') {
            base = digits[1] == 'x' || digits[1] == 'X' ? 16 : digits[1] == 'b' || digits[1] == 'B' ? 2 : 8;
            digits += base == 8 ? 1 : 2;
        }
        char* end;
        uint64_t value = strtoull(digits, &end, base);
        if (*end) at_--, fail("an integer");
        return negative ? -(int64_t)value : (int64_t)value;
    }

    // A number: 0f3F800000, 0d3FF0000000000000, an integer, or a decimal fraction.
    Operand number() {
        Operand o;
        std::string_view text = now().text;
        bool is_hex_float = text.size() > 2 && text[0] == '0' && strchr("fFdD", text[1]) &&
                            (text.size() == 10 || text.size() == 18);
        if (now().kind == Token::number && is_hex_float) {
            o.kind = text[1] == 'f' || text[1] == 'F' ? Operand::float32 : Operand::float64;
            o.value = (int64_t)strtoull(std::string(text.substr(2)).c_str(), nullptr, 16);
            at_++;
        } else if (now().kind == Token::number && text.find('.') != text.npos) {
            double value = strtod(std::string(text).c_str(), nullptr);
            o.kind = Operand::float64;
            memcpy(&o.value, &value, sizeof(value));
            at_++;
        } else {
            o.kind = Operand::integer;
            o.value = integer();
        }
        return o;
    }

    void top_level() {
        if (accept(".version") || accept(".target") || accept(".address_size")) {
            next();
            while (accept(",")) next();
        } else if (accept(".file")) {
            int index = (int)integer();
            module_.files[index] = std::string(next().text);
            while (accept(",")) next();
        } else if (accept(".section")) {
            while (!accept("}")) next();
        } else if (is(".pragma")) {
            while (!accept(";")) next();
        } else {
            bool is_extern = false;
            while (is(".visible") || is(".extern") || is(".weak") || is(".common"))
                is_extern |= next().text == ".extern";
            if (accept(".entry")) {
                function(true);
            } else if (accept(".func")) {
                function(false);
            } else if (is(".global") || is(".const") || is(".shared")) {
                for (VariableDeclaration& v : variables()) {
                    v.is_extern = is_extern;
                    module_.variables.push_back(std::move(v));
                }
            } else if (accept(".alias")) {
                fail("a directive other than .alias, which is not supported");
            } else {
                fail("a directive");
            }
        }
    }

    // .space [.align n] [.ptr ...] .type name [size] [= values], name ... ;   (parameters have no ';')
    std::vector<VariableDeclaration> variables() {
        std::vector<VariableDeclaration> all;
        VariableDeclaration shape = declaration_head();
        do {
            VariableDeclaration v = shape;
            v.name = word();
            declaration_tail(v);
            all.push_back(std::move(v));
        } while (accept(","));
        expect(";");
        return all;
    }

    VariableDeclaration declaration_head() {
        static const std::map<std::string, Space> spaces = {
            {".global", Space::global}, {".const", Space::constant}, {".shared", Space::shared},
            {".local", Space::local},   {".param", Space::param},    {".reg", Space::generic}};
        VariableDeclaration v;
        auto space = spaces.find(std::string(now().text));
        if (space == spaces.end()) fail("a state space");
        next();
        v.space = space->second;
        while (true) {
            if (accept(".align")) {
                v.align = (int)integer();
            } else if (accept(".attribute")) {
                while (!accept(")")) v.is_managed |= next().text == ".managed";
            } else if (accept(".ptr")) {
                while (is(".global") || is(".const") || is(".shared") || is(".local") || is(".align"))
                    if (next().text == ".align") integer();
            } else if (is(".v2") || is(".v4")) {
                v.count = next().text == ".v2" ? 2 : 4;
            } else {
                break;
            }
            if (!v.type.empty()) break;
        }
        v.type = word().substr(1);
        if (!type_bytes(v.type)) at_--, fail("a type");
        while (accept(".ptr")) {
            while (is(".global") || is(".const") || is(".shared") || is(".local")) next();
            if (accept(".align")) integer();
        }
        return v;
    }

    void declaration_tail(VariableDeclaration& v) {
        int64_t elements = v.count;
        bool sized = false;
        while (accept("[")) {
            int64_t n = is("]") ? 0 : integer();
            elements = sized ? elements * n : v.count * n;
            sized = true;
            expect("]");
        }
        v.count = elements;
        if (accept("=")) initializer(v);
    }

    void initializer(VariableDeclaration& v) {
        if (accept("{")) {
            while (!accept("}")) {
                initializer(v);
                accept(",");
            }
            return;
        }
        VariableDeclaration::Value value;
        if (now().kind == Token::word) {
            value.symbol = word();
            if (value.symbol == "generic") {
                expect("(");
                value.symbol = word();
                value.generic_address = true;
                if (accept("+")) value.bits = (uint64_t)integer();
                expect(")");
            }
            if (accept("+")) value.bits += (uint64_t)integer();
        } else if (now().kind == Token::number && tokens_[at_ + 1].text == "(") {  // 0xFF00(symbol)
            uint64_t mask = (uint64_t)integer();
            value.mask_shift = mask ? __builtin_ctzll(mask) : 0;
            expect("(");
            value.symbol = word();
            if (value.symbol == "generic") {
                expect("(");
                value.symbol = word();
                if (accept("+")) value.bits = (uint64_t)integer();
                expect(")");
            }
            if (accept("+")) value.bits += (uint64_t)integer();
            expect(")");
        } else {
            value.bits = (uint64_t)number().value;
        }
        v.values.push_back(value);
    }

    std::vector<VariableDeclaration> parameter_list() {
        std::vector<VariableDeclaration> all;
        expect("(");
        while (!accept(")")) {
            VariableDeclaration v = declaration_head();
            v.name = word();
            declaration_tail(v);
            all.push_back(std::move(v));
            accept(",");
        }
        return all;
    }

    void function(bool is_entry) {
        FunctionText f;
        f.is_entry = is_entry;
        f.ptx_line = now().line;
        if (is("(")) f.results = parameter_list();
        f.name = word();
        if (is("(")) f.parameters = parameter_list();
        while (!is("{") && !is(";") && now().kind != Token::body) {
            std::string directive = word();
            if (directive == ".maxntid" || directive == ".reqntid") {
                f.required_threads = directive == ".reqntid";
                f.max_threads = (int)integer();
                while (accept(",")) f.max_threads *= (int)integer();
            } else if (directive == ".minnctapersm" || directive == ".maxnreg" ||
                       directive == ".maxnctapersm") {
                integer();
            } else if (directive != ".noreturn") {
                at_--;
                fail("a directive of a function");
            }
        }
        if (accept(";")) {
            f.is_declaration = true;
        } else if (now().kind == Token::body) {
            f.unparsed_line = now().line;
            f.unparsed = next().text;
        } else {
            body(f);
        }
        auto& slot = module_.functions[f.name];
        if (slot.name.empty() || !f.is_declaration) slot = std::move(f);
    }

    // .loc file line column [, function_name label [+ n], inlined_at file line column]
    void location() {
        source_ = {(int)integer(), (int)integer(), 0, 0};
        integer();
        while (accept(",")) {
            std::string what = word();
            if (what == "function_name") {
                word();
                if (accept("+")) integer();
            } else if (what == "inlined_at") {
                source_.caller_file = (int)integer();
                source_.caller_line = (int)integer();
                integer();
            } else {
                at_--;
                fail("function_name or inlined_at");
            }
        }
    }

    void registers(FunctionText& f) {
        Statement s;
        s.kind = Statement::registers;
        s.ptx_line = now().line;
        expect(".reg");
        s.op = word().substr(1);
        if (!type_bytes(s.op)) at_--, fail("a type");
        do {
            Operand name;
            name.text = word();
            s.operands = {name};
            s.count = 0;
            if (accept("<")) {
                s.count = (int)integer();
                expect(">");
            }
            f.body.push_back(s);
        } while (accept(","));
        expect(";");
    }

    void instruction(Statement& s) {
        s.kind = Statement::instruction;
        if (accept("@")) {
            s.guard_negated = accept("!");
            s.guard = word();
        }
        std::string op = word();
        size_t dot = op.find('.');
        s.op = op.substr(0, dot);
        while (dot != op.npos) {
            size_t end = op.find('.', dot + 1);
            s.modifiers.push_back(op.substr(dot + 1, end == op.npos ? end : end - dot - 1));
            dot = end;
        }
        while (!accept(";")) {
            s.operands.push_back(operand());
            if (accept("|")) {
                Operand pair = operand();
                pair.lane_predicate = true;
                s.operands.push_back(pair);
            }
            accept(",");
        }
    }

    Operand operand() {
        Operand o;
        if (accept("!")) {
            o = operand();
            o.negated = true;
        } else if (is("{") || is("(")) {
            std::string_view closing = next().text == "{" ? "}" : ")";
            o.kind = Operand::vector;
            while (!accept(closing)) {
                o.parts.push_back(operand());
                accept(",");
            }
        } else if (accept("[")) {
            o.kind = Operand::address;
            if (now().kind == Token::word) {
                o.text = word();
            } else {
                o.value = integer();
            }
            while (is("+") || is("-")) {
                if (is("+")) next();
                o.value += integer();
            }
            expect("]");
        } else if (accept("_")) {
            o.kind = Operand::ignored;
        } else if (now().kind == Token::word) {
            o.text = word();
            if (is("+") || is("-")) {  // the address of a variable plus an offset
                if (is("+")) next();
                o.value = integer();
            }
        } else {
            o = number();
        }
        return o;
    }
};

}  // namespace

ModuleText parse(std::string_view ptx, const std::string& name) {
    return Parser(ptx, name).run();
}

void parse_body(const ModuleText& module, FunctionText* entry) {
    if (entry->unparsed.empty()) return;
    Parser(entry->unparsed, module.name, entry->unparsed_line).body(*entry);
    entry->unparsed = {};
}

}  // namespace ptxsim
