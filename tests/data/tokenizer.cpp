#include "llmc/tokenizer.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/helpers.h"

namespace {

using Json = nlohmann::json;

// Texts and their ids with tests/golden/tokenizer.json and with GPT-2's vocabulary, both computed by Hugging
// Face tokenizers 0.23.
struct Golden {
    std::string text;
    std::vector<int> small, gpt2;
};
// clang-format off
const std::vector<Golden> kGolden = {
    {"",
     {},
     {}},
    {"a",
     {67},
     {64}},
    {"Hello world",
     {42, 418, 81, 527, 316},
     {15496, 995}},
    {"  two  spaces ",
     {223, 259, 89, 81, 223, 440, 67, 69, 281, 223},
     {220, 734, 220, 9029, 220}},
    {"First Citizen:\nBefore we proceed any further, hear me speak.\n",
     {487, 626, 28, 201, 762, 565, 320, 752, 308, 317, 439, 91, 280, 337, 659, 14, 682, 327, 673, 16, 201},
     {5962, 22307, 25, 198, 8421, 356, 5120, 597, 2252, 11, 3285, 502, 2740, 13, 198}},
    {"I'm we're they've you'll he'd DON'T it's 'tis ''s",
     {43, 777, 320, 753, 409, 771, 284, 429, 293, 331, 223, 38, 49, 48, 9, 54, 339, 324, 462, 86, 273, 462, 9, 85},
     {40, 1101, 356, 821, 484, 1053, 345, 1183, 339, 1549, 23917, 6, 51, 340, 338, 705, 48010, 10148, 82}},
    {"line\n\n\n  indented\t\ttab\r\n end  ",
     {78, 514, 201, 201, 201, 223, 311, 70, 355, 317, 200, 200, 86, 67, 68, 204, 201, 329, 270, 447},
     {1370, 628, 198, 220, 773, 4714, 197, 197, 8658, 201, 198, 886, 220, 220}},
    {"   ",
     {447, 223},
     {220, 220, 220}},
    {"\n",
     {201},
     {198}},
    {"x = 1234567 + 89.5e-3 (½ ² ٣ Ⅷ)",
     {90, 223, 31, 864, 783, 25, 223, 13, 223, 26, 27, 16, 23, 71, 15, 21, 223, 10, 129, 124, 223, 129, 113, 223, 152, 99, 223, 161, 230, 103, 11},
     {87, 796, 17031, 2231, 3134, 1343, 9919, 13, 20, 68, 12, 18, 357, 23141, 1587, 110, 18923, 96, 2343, 227, 100, 8}},
    {"日本語のテキスト、中文。한국어",
     {882, 808, 226, 810, 859, 808, 227, 815, 835, 861},
     {33768, 98, 17312, 105, 45739, 252, 5641, 24336, 25084, 43302, 23513, 40792, 23877, 229, 16764, 47991, 250, 166, 113, 255, 168, 244, 112}},
    {"привет мир, Ελληνικά ñandú",
     {143, 802, 871, 872, 14, 880, 843, 484, 130, 121},
     {140, 123, 21169, 18849, 38857, 16843, 20375, 12466, 120, 18849, 21169, 11, 7377, 243, 39377, 39377, 138, 115, 26180, 29945, 43000, 138, 105, 6184, 109, 392, 21356}},
    {"é e\314\201 a\314\210\314\243o",
     {130, 105, 329, 804, 262, 139, 233, 139, 99, 81},
     {2634, 304, 136, 223, 257, 136, 230, 136, 96, 78}},
    {"\360\237\221\215\360\237\217\275\360\237\221\250\342\200\215\360\237\221\251\342\200\215\360\237\221\247 \360\237\230\200\360\237\207\251\360\237\207\252!",
     {399, 831, 832, 399, 787, 850, 863, 363, 232, 105, 363, 232, 106, 3},
     {41840, 235, 8582, 237, 121, 41840, 101, 447, 235, 41840, 102, 447, 235, 41840, 100, 30325, 222, 8582, 229, 102, 8582, 229, 103, 0}},
    {"a\302\240b\343\200\200c\342\200\203\342\200\203d\341\240\216e\342\200\213f\302\205g",
     {67, 803, 68, 808, 225, 69, 839, 839, 70, 160, 257, 239, 71, 451, 236, 72, 129, 230, 73},
     {64, 1849, 65, 5099, 222, 66, 447, 225, 447, 225, 67, 157, 254, 236, 68, 9525, 69, 126, 227, 70}},
    {"<|endoftext|>",
     {0},
     {50256}},
    {"one<|endoftext|>two <|endoftext|> three",
     {488, 0, 86, 89, 81, 223, 0, 295, 266, 71},
     {505, 50256, 11545, 220, 50256, 1115}},
    {"<|endoftext|><|endoftext|>  <|endoftext|>\n",
     {0, 0, 447, 0, 201},
     {50256, 50256, 220, 220, 50256, 198}},
    {"<|end|>ing <|end|> <|end|>in <|endoftext",
     {2, 223, 1, 223, 1, 265, 223, 30, 94, 425, 81, 72, 86, 71, 90, 86},
     {27, 91, 437, 91, 29, 278, 1279, 91, 437, 91, 29, 1279, 91, 437, 91, 29, 259, 1279, 91, 437, 1659, 5239}},
    {std::string("tab\000nul\177\037", 9),
     {86, 67, 68, 191, 80, 433, 224, 222},
     {8658, 188, 77, 377, 221, 219}},
    {"Ġword ĊÿĀ ",
     {131, 257, 89, 361, 223, 131, 235, 130, 126, 131, 225, 223},
     {128, 254, 4775, 34754, 232, 127, 123, 128, 222, 220}},
    {"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
     {67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67},
     {24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 64}},
    {"thethethethe the",
     {86, 260, 86, 260, 86, 260, 86, 260, 269},
     {1169, 1169, 1169, 1169, 262}},
    {"!!!?\??...---___ ,,,  ;;;",
     {3, 3, 3, 33, 33, 33, 16, 16, 16, 499, 15, 65, 65, 65, 223, 14, 14, 14, 223, 223, 29, 29, 29},
     {10185, 28358, 986, 6329, 17569, 837, 9832, 220, 2162, 7665}},
    {"\357\273\277BOM � \364\217\277\277",
     {174, 122, 126, 36, 49, 47, 223, 174, 126, 124, 223, 179, 240, 126, 126},
     {171, 119, 123, 33, 2662, 20543, 220, 176, 237, 123, 123}},
};
// clang-format on

std::string golden_path() {
    return (std::filesystem::path(__FILE__).parent_path() / "../golden/tokenizer.json").string();
}

// A tokenizer.json with a token for every byte (its id is the byte), these merges in this order, and the
// tokens that they make.
Json small_json(const std::vector<std::pair<std::string, std::string>>& merges) {
    Json vocab = Json::object(), merge_list = Json::array();
    int others = 256;
    for (int byte = 0; byte < 256; byte++) {
        const bool printable = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
        const int code = printable ? byte : others++;
        std::string name(1, (char)code);
        if (code > 127) name = {(char)(0xc0 | code >> 6), (char)(0x80 | (code & 63))};
        vocab[name] = byte;
    }
    for (const auto& [left, right] : merges) {
        merge_list.push_back({left, right});
        if (!vocab.contains(left + right)) vocab[left + right] = vocab.size();
    }
    const Json added = {
        {"id", vocab.size()}, {"content", "<|endoftext|>"}, {"single_word", false}, {"lstrip", false},
        {"rstrip", false},    {"normalized", false},        {"special", true}};
    return {{"version", "1.0"},
            {"truncation", nullptr},
            {"padding", nullptr},
            {"added_tokens", {added}},
            {"normalizer", nullptr},
            {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
            {"post_processor", nullptr},
            {"decoder", {{"type", "ByteLevel"}}},
            {"model", {{"type", "BPE"}, {"dropout", nullptr}, {"vocab", vocab}, {"merges", merge_list}}}};
}

Tokenizer load(const TempFolder& folder, const Json& json) {
    put_file(folder / "tokenizer.json", json.dump());
    return Tokenizer(folder / "tokenizer.json");
}

// The processor time of f, which does not depend on how busy the machine is.
double seconds_of(const std::function<void()>& f) {
    const std::clock_t start = std::clock();
    f();
    return double(std::clock() - start) / CLOCKS_PER_SEC;
}

}  // namespace

TEST_CASE("Tokenizer: the same ids as Hugging Face tokenizers") {
    const Tokenizer tokenizer(golden_path());
    CHECK(tokenizer.vocab_size() == 900);
    CHECK(tokenizer.eot_token() == 0);
    for (const Golden& golden : kGolden) {
        CAPTURE(golden.text);
        CHECK(tokenizer.encode(golden.text) == golden.small);
        CHECK(tokenizer.decode(golden.small) == golden.text);
    }
}

TEST_CASE("Tokenizer: merges in the older form, \"a b\", are the same") {
    const TempFolder folder;
    Json json = read_json(golden_path());
    for (Json& merge : json["model"]["merges"])
        merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
    const Tokenizer tokenizer = load(folder, json);
    for (const Golden& golden : kGolden) CHECK(tokenizer.encode(golden.text) == golden.small);
}

TEST_CASE("Tokenizer: GPT-2's vocabulary") {
    const char* data = std::getenv("LLMC_TEST_DATA");
    if (!data) {
        MESSAGE("skipped: LLMC_TEST_DATA is not set");
        return;
    }
    const TempFolder folder;
    const std::string gpt2 = std::string(data) + "/gpt2/";
    Json json = small_json({});
    json["model"]["vocab"] = read_json(gpt2 + "encoder.json");
    json["added_tokens"][0]["id"] = 50256;
    Json merges = Json::array();
    const std::string text = read_text(gpt2 + "vocab.bpe");
    for (size_t at = text.find('\n') + 1; at < text.size();
         at = text.find('\n', at) + 1)  // skips the version
        merges.push_back(text.substr(at, text.find('\n', at) - at));
    json["model"]["merges"] = merges;
    const Tokenizer tokenizer = load(folder, json);
    CHECK(tokenizer.vocab_size() == 50257);
    CHECK(tokenizer.eot_token() == 50256);
    CHECK(tokenizer.encode("Hello world") == std::vector<int>{15496, 995});
    for (const Golden& golden : kGolden) {
        CAPTURE(golden.text);
        CHECK(tokenizer.encode(golden.text) == golden.gpt2);
        CHECK(tokenizer.decode(golden.gpt2) == golden.text);
    }
}

TEST_CASE("Tokenizer: decode gives bytes, and refuses ids that do not exist") {
    const Tokenizer tokenizer(golden_path());
    std::set<std::string> bytes;
    for (int id = 0; id < tokenizer.vocab_size(); id++) {
        if (tokenizer.decode(id).size() == 1) bytes.insert(tokenizer.decode(id));
    }
    CHECK(bytes.size() == 256);
    CHECK(tokenizer.decode(2) == "<|end|>ing");
    CHECK(tokenizer.decode(std::vector<int>{}) == "");
    for (int id : {-1, 900, INT32_MIN, INT32_MAX})
        check_error([&] { tokenizer.decode(id); }, {golden_path(), "token id " + std::to_string(id), "900"});
}

TEST_CASE("Tokenizer: text that is not UTF-8 is refused with its place") {
    const Tokenizer tokenizer(golden_path());
    for (const char* bad :
         {"\xff", "\x80", "\xc0\x80", "\xc1\xbf", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xf0\x8f\xbf\xbf",
          "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xe6\x97", "\xf0\x9f\x91", "\xc3", "\xc3x", "\xe6xx"}) {
        CAPTURE(bad);
        check_error([&] { tokenizer.encode(bad); }, {"UTF-8", "byte offset 0"});
        check_error([&] { tokenizer.encode(std::string("a\u00e9\U0001f600") + bad); },
                    {"UTF-8", "byte offset 7"});
    }
    for (const char* good :
         {"\x7f", "\u0080", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff"})
        CHECK(tokenizer.decode(tokenizer.encode(good)) == good);
}

TEST_CASE("Tokenizer: merging as by the definition, over random merges and words") {
    const TempFolder folder;
    std::mt19937 random(3);
    for (int round = 0; round < 40; round++) {
        // Random merges of existing tokens, so that a later merge often makes a pair of a lower rank.
        std::vector<std::string> tokens = {"a", "b", "c"};
        std::vector<std::pair<std::string, std::string>> merges;
        std::map<std::pair<std::string, std::string>, int> ranks;
        for (int i = 0; i < 30; i++) {
            const std::pair pair(tokens[random() % tokens.size()], tokens[random() % tokens.size()]);
            if (ranks.count(pair) || pair.first.size() + pair.second.size() > 8) continue;
            ranks[pair] = 0;
            merges.push_back(pair);
            tokens.push_back(pair.first + pair.second);
        }
        std::shuffle(merges.begin(), merges.end(), random);
        for (size_t i = 0; i < merges.size(); i++) ranks[merges[i]] = (int)i;
        const Tokenizer tokenizer = load(folder, small_json(merges));
        for (int word = 0; word < 30; word++) {
            std::vector<std::string> parts(1 + random() % 40);
            std::string text;
            for (std::string& part : parts) text += part = std::string(1, (char)('a' + random() % 3));
            while (true) {  // merges the leftmost pair of the lowest rank, until there is none
                int best = INT32_MAX;
                size_t place = 0;
                for (size_t i = 0; i + 1 < parts.size(); i++) {
                    const auto rank = ranks.find({parts[i], parts[i + 1]});
                    if (rank != ranks.end() && rank->second < best) best = rank->second, place = i;
                }
                if (best == INT32_MAX) break;
                parts[place] += parts[place + 1];
                parts.erase(parts.begin() + (long)place + 1);
            }
            std::vector<std::string> found;
            for (int id : tokenizer.encode(text)) found.push_back(tokenizer.decode(id));
            REQUIRE(found == parts);
        }
    }
}

TEST_CASE("Tokenizer: a word of a million letters takes no long time") {
    const TempFolder folder;
    std::vector<std::pair<std::string, std::string>> merges;
    for (int size = 1; size < 64; size *= 2)
        merges.push_back({std::string(size, 'a'), std::string(size, 'a')});
    const Tokenizer tokenizer = load(folder, small_json(merges));
    const std::string word(1'000'003, 'a'), spaces(300'000, ' ');
    std::vector<int> ids;
    CHECK(seconds_of([&] { ids = tokenizer.encode(word); }) < 10);
    CHECK(ids.size() == 1'000'000 / 64 + 2);  // the last two are "aa" and "a"
    CHECK((tokenizer.decode(ids) == word));
    CHECK(seconds_of([&] { ids = tokenizer.encode(spaces + "x" + word); }) < 10);
    CHECK((tokenizer.decode(ids) == spaces + "x" + word));
}

TEST_CASE("Tokenizer: what a file may leave out or say otherwise without other ids") {
    const TempFolder folder;
    Json json = small_json({{"a", "b"}});
    const std::vector<int> ids = {256, 257, 'c'};
    CHECK(load(folder, json).encode("ab<|endoftext|>c") == ids);
    for (const char* key : {"type", "dropout"}) json["model"].erase(key);
    for (const char* key : {"decoder", "post_processor", "normalizer", "truncation", "padding", "version"})
        json.erase(key);
    json["pre_tokenizer"].erase("use_regex");
    CHECK(load(folder, json).encode("ab<|endoftext|>c") == ids);
    json["post_processor"] = {{"type", "ByteLevel"}, {"trim_offsets", false}};
    json["model"]["unk_token"] = "<|endoftext|>";  // it is never used, because every byte has a token
    json["model"]["continuing_subword_prefix"] = "";
    json["model"]["dropout"] = 0;
    json["truncation"] = {
        {"direction", "Right"}, {"max_length", 2}, {"strategy", "LongestFirst"}, {"stride", 0}};
    json["padding"] = {{"strategy", {{"Fixed", 8}}}, {"pad_id", 0}, {"pad_token", "!"}};
    CHECK(load(folder, json).encode("ab<|endoftext|>c") == ids);
    // These post-processors add special tokens or nothing.
    const Json text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}},
               end = {{"SpecialToken", {{"id", "<|endoftext|>"}, {"type_id", 0}}}},
               bert = {{"type", "BertProcessing"}, {"sep", {"a", 97}}, {"cls", {"b", 98}}},
               roberta = {{"type", "RobertaProcessing"}, {"sep", {"a", 97}}, {"cls", {"b", 98}}};
    for (const Json& single :
         {Json::array({text}), Json::array({end, text}), Json::array({end, text, end})}) {
        const Json processor = {{"type", "TemplateProcessing"}, {"single", single}};
        for (const Json& p : {processor, bert, roberta,
                              Json{{"type", "Sequence"}, {"processors", {processor, bert, roberta}}}}) {
            json["post_processor"] = p;
            CHECK(load(folder, json).encode("ab<|endoftext|>c") == ids);
        }
    }
    json.erase("added_tokens");
    const Tokenizer plain = load(folder, json);
    CHECK(plain.eot_token() == -1);
    CHECK(plain.vocab_size() == 257);
    CHECK(plain.encode("<|").size() == 2);
    json["model"]["vocab"]["<|endoftext|>"] = 257;  // GPT-2 also has it in the vocabulary
    CHECK(load(folder, json).eot_token() == 257);
}

TEST_CASE("Tokenizer: what it does not implement, or what is malformed, is an error") {
    const TempFolder folder;
    const std::string path = folder / "tokenizer.json";
    auto check_bad = [&](const std::function<void(Json&)>& change, std::initializer_list<std::string> parts) {
        Json json = small_json({{"a", "b"}, {"ab", "c"}});
        change(json);
        check_error([&] { load(folder, json); }, {path});
        check_error([&] { load(folder, json); }, parts);
    };
    check_bad([](Json& j) { j = Json::array(); }, {"expected a JSON object"});
    check_bad([](Json& j) { j["normalizer"] = {{"type", "NFC"}}; }, {"normalizer", "NFC", "null"});
    check_bad([](Json& j) { j["pre_tokenizer"] = nullptr; }, {"pre_tokenizer is null"});
    check_bad(
        [](Json& j) {
            j["pre_tokenizer"] = {{"type", "Whitespace"}};
        },
        {"pre_tokenizer", "Whitespace"});
    check_bad([](Json& j) { j["pre_tokenizer"]["add_prefix_space"] = true; },
              {"pre_tokenizer.add_prefix_space"});
    check_bad([](Json& j) { j["pre_tokenizer"]["use_regex"] = false; }, {"pre_tokenizer.use_regex"});
    const Json once = {{"Sequence", {{"id", "A"}}}}, other = {{"Sequence", {{"id", "B"}}}};
    for (const Json& single : {Json(), Json("$A"), Json::array(), Json::array({once, once}),
                               Json::array({other}), Json::array({once, 1})}) {
        const Json processor = {{"type", "TemplateProcessing"}, {"single", single}};
        check_bad([&](Json& j) { j["post_processor"] = processor; }, {"post_processor", "single"});
        const Json both = {{"type", "Sequence"}, {"processors", {{{"type", "ByteLevel"}}, processor}}};
        check_bad([&](Json& j) { j["post_processor"] = both; }, {"post_processor", "Sequence"});
    }
    check_bad([](Json& j) { j["post_processor"] = {{"type", "Another"}}; }, {"post_processor", "Another"});
    check_bad([](Json& j) { j["post_processor"] = 1; }, {"post_processor is 1"});
    check_bad([](Json& j) { j["decoder"] = {{"type", "Metaspace"}}; }, {"decoder", "Metaspace"});
    check_bad([](Json& j) { j["decoder"] = 1; }, {"decoder is 1"});
    check_bad([](Json& j) { j["model"] = nullptr; }, {"model is not an object"});
    check_bad([](Json& j) { j["model"]["type"] = "Unigram"; }, {"model.type", "Unigram"});
    check_bad([](Json& j) { j["model"]["byte_fallback"] = true; }, {"model.byte_fallback is true"});
    check_bad([](Json& j) { j["model"]["ignore_merges"] = true; }, {"model.ignore_merges is true"});
    check_bad([](Json& j) { j["model"]["dropout"] = 0.1; }, {"model.dropout is 0.1"});
    check_bad([](Json& j) { j["model"]["end_of_word_suffix"] = "</w>"; },
              {"model.end_of_word_suffix", "</w>"});
    check_bad([](Json& j) { j["model"]["continuing_subword_prefix"] = "##"; },
              {"continuing_subword_prefix", "##"});
    check_bad([](Json& j) { j["model"]["vocab"] = Json::array(); }, {"model.vocab is not an object"});
    check_bad([](Json& j) { j["model"]["vocab"] = Json::object(); },
              {"model.vocab", "byte 0 is not a token"});
    check_bad([](Json& j) { j["model"]["merges"] = 1; }, {"model.merges is not an array"});
    // The vocabulary must have each id once, from 0 without holes, and a token for every byte.
    check_bad([](Json& j) { j["model"]["vocab"]["ab"] = 255; },
              {"model.vocab", "is 255", "each of 0 to 257 once"});
    check_bad([](Json& j) { j["model"]["vocab"]["ab"] = 258; }, {"\"ab\" is 258", "0 to 257"});
    check_bad([](Json& j) { j["model"]["vocab"]["ab"] = -1; }, {"\"ab\" is -1"});
    check_bad([](Json& j) { j["model"]["vocab"]["ab"] = 1e300; }, {"\"ab\" is 1e+300"});
    check_bad([](Json& j) { j["model"]["vocab"]["ab"] = "256"; }, {"\"ab\" is \"256\""});
    check_bad(
        [](Json& j) {
            j["model"]["vocab"].erase("A");
            j["model"]["vocab"]["AA"] = 65;
        },
        {"byte 65 is not a token", "\"A\""});
    // A merge must name two tokens that make a third one, and must come only once.
    check_bad([](Json& j) { j["model"]["merges"][1] = 1; }, {"model.merges[1]: 1"});
    check_bad([](Json& j) { j["model"]["merges"][1] = "abc"; }, {"model.merges[1]: \"abc\""});
    check_bad([](Json& j) { j["model"]["merges"][1] = "a  b"; }, {"model.merges[1]"});
    check_bad([](Json& j) { j["model"]["merges"][1] = {"a", "b", "c"}; }, {"model.merges[1]"});
    check_bad([](Json& j) { j["model"]["merges"][1] = {"a", 1}; }, {"model.merges[1]"});
    check_bad([](Json& j) { j["model"]["merges"][1] = "a c"; },
              {"model.merges[1]", "does not merge two tokens into one"});
    check_bad([](Json& j) { j["model"]["merges"][1] = "x bc"; },
              {"model.merges[1]", "does not merge two tokens into one"});
    check_bad([](Json& j) { j["model"]["merges"][1] = "a b"; }, {"model.merges[1]", "occurs twice"});
    // The added tokens.
    auto check_added = [&](const char* key, const Json& value, std::initializer_list<std::string> parts) {
        check_bad([&](Json& j) { j["added_tokens"][0][key] = value; }, {"added_tokens[0]"});
        check_bad([&](Json& j) { j["added_tokens"][0][key] = value; }, parts);
    };
    check_bad([](Json& j) { j["added_tokens"] = 1; }, {"added_tokens is not an array"});
    check_bad([](Json& j) { j["added_tokens"][0] = "x"; }, {"added_tokens[0]", "no content"});
    check_added("content", nullptr, {"no content"});
    check_added("content", "", {"no content"});
    check_added("id", 300, {"its id should be 258"});
    check_added("id", nullptr, {"its id should be 258"});
    check_added("content", "ab", {"its id should be 256"});
    for (const char* flag : {"single_word", "lstrip", "rstrip"})
        check_added(flag, true, {std::string(flag) + " is set"});
    check_bad(
        [](Json& j) {  // in the vocabulary "\u00e9" means the byte 0xe9, not this character
            j["added_tokens"][0]["content"] = "\u00e9";
            j["added_tokens"][0]["id"] = 0xe9;
        },
        {"added_tokens[0]", "has other bytes in model.vocab"});
    put_file(path, "{\"model\": ");
    check_error([&] { Tokenizer{path}; }, {path, "not valid JSON"});
    check_error([&] { Tokenizer{folder / "none"}; }, {folder / "none", "No such file"});
}

TEST_CASE("Tokenizer: added tokens that are normalized are looked for after the others") {
    const TempFolder folder;
    Json json = small_json({});
    for (const char* content : {"a<|e", "dof"}) {
        Json added = json["added_tokens"][0];
        added["content"] = content;
        added["normalized"] = true;
        added["id"] = 256 + json["added_tokens"].size();
        json["added_tokens"].push_back(added);
    }
    CHECK(load(folder, json).encode("endof<|endoftext|>a<|endoftext|>a<|ex") ==
          std::vector<int>{'e', 'n', 258, 256, 'a', 256, 257, 'x'});
}

TEST_CASE("Tokenizer: a file of another kind is told from a damaged one") {
    const TempFolder folder;
    const std::string path = folder / "tokenizer.json";
    auto is_unsupported = [&](const std::function<void(Json&)>& change) {
        Json json = small_json({{"a", "b"}, {"ab", "c"}});
        change(json);
        put_file(path, json.dump());
        try {
            Tokenizer{path};
        } catch (const UnsupportedTokenizer&) {
            return true;
        } catch (const Error&) {
        }
        return false;
    };
    CHECK(is_unsupported([](Json& j) { j["normalizer"] = {{"type", "NFC"}}; }));
    CHECK(is_unsupported([](Json& j) { j["model"]["type"] = "Unigram"; }));
    CHECK(is_unsupported([](Json& j) { j["pre_tokenizer"]["use_regex"] = false; }));
    CHECK(is_unsupported([](Json& j) { j["decoder"] = {{"type", "Metaspace"}}; }));
    CHECK(is_unsupported([](Json& j) { j["post_processor"] = {{"type", "Another"}}; }));
    CHECK(is_unsupported([](Json& j) { j["model"]["vocab"]["ab"] = 300; }));
    CHECK(is_unsupported([](Json& j) { j["model"]["vocab"] = Json::object(); }));
    CHECK(is_unsupported([](Json& j) { j["added_tokens"][0]["lstrip"] = true; }));
    CHECK_FALSE(is_unsupported([](Json& j) { j = Json::object(); }));
    CHECK_FALSE(is_unsupported([](Json& j) { j["model"] = 1; }));
    CHECK_FALSE(is_unsupported([](Json& j) { j["model"]["merges"][1] = "a c"; }));
    CHECK_FALSE(is_unsupported([](Json& j) { j["added_tokens"] = 1; }));
}

TEST_CASE("require_same_tokenizer: only what decides the ids counts") {
    const TempFolder folder;
    const std::string data = folder / "data.json", model = folder / "model.json";
    auto error = [&](const Json& a, const Json& b) {
        put_file(data, a.dump());
        put_file(model, b.dump());
        const std::string there = error_of([&] {
            const MappedFile data_file(data), model_file(model);
            require_same_tokenizer(&data_file, &model_file, "; advice");
        });
        put_file(data, b.dump(1));
        put_file(model, a.dump());
        const std::string back = error_of([&] {
            const MappedFile data_file(data), model_file(model);
            require_same_tokenizer(&data_file, &model_file);
        });
        CHECK((back == "") == (there == ""));
        return there;
    };
    const Json json = small_json({{"a", "b"}, {"ab", "c"}});
    auto changed = [&](const std::function<void(Json&)>& change) {
        Json other = json;
        change(other);
        return other;
    };
    // Differences that appear when a library loads and saves a file, and those of GPT-2's first files.
    const std::function<void(Json&)> same[] = {
        [](Json&) {},
        [](Json& j) {
            j["truncation"] = {{"max_length", 2}}, j["padding"] = {{"pad_id", 0}};
        },
        [](Json& j) {
            j["post_processor"] = {{"type", "TemplateProcessing"}}, j["decoder"] = nullptr;
        },
        [](Json& j) {
            j["model"]["merges"] = {"a b", "ab c"}, j["model"].erase("dropout");
        },
        [](Json& j) { j["model"]["continuing_subword_prefix"] = "", j["model"]["dropout"] = 0.0; },
        [](Json& j) { j["model"]["unk_token"] = "<|endoftext|>", j["model"]["fuse_unk"] = true; },
        [](Json& j) { j["model"].erase("type"); },
        [](Json& j) { j["model"]["ignore_merges"] = false, j["model"]["byte_fallback"] = nullptr; },
        [](Json& j) { j["model"]["vocab"]["<|endoftext|>"] = 258; },
        [](Json& j) { j["added_tokens"][0]["normalized"] = true, j["added_tokens"][0]["special"] = false; },
        [](Json& j) { j["pre_tokenizer"].erase("use_regex"), j["pre_tokenizer"]["trim_offsets"] = false; },
        [](Json& j) { j.erase("normalizer"), j["version"] = "2.0"; },
    };
    for (const auto& change : same) CHECK(error(json, changed(change)) == "");
    const std::pair<std::function<void(Json&)>, std::string> others[] = {
        {[](Json& j) { std::swap(j["model"]["vocab"]["a"], j["model"]["vocab"]["b"]); }, "vocabulary"},
        {[](Json& j) { j["model"]["vocab"]["x y"] = 259; }, "vocabulary"},
        {[](Json& j) { std::swap(j["model"]["merges"][0], j["model"]["merges"][1]); }, "merges"},
        {[](Json& j) { j["model"]["merges"].erase(1); }, "merges"},
        {[](Json& j) { j["added_tokens"][0]["content"] = "</s>"; }, "vocabulary"},
        {[](Json& j) { j["added_tokens"].erase(0), j["model"]["vocab"]["<|endoftext|>"] = 258; },
         "added tokens"},
        {[](Json& j) { j["added_tokens"][0]["lstrip"] = true; }, "added tokens"},
        {[](Json& j) {
             j["normalizer"] = {{"type", "NFC"}};
         },
         "normalizer"},
        {[](Json& j) { j["pre_tokenizer"]["use_regex"] = false; }, "pre-tokenizer"},
        {[](Json& j) { j["pre_tokenizer"]["add_prefix_space"] = true; }, "pre-tokenizer"},
        {[](Json& j) { j["model"]["ignore_merges"] = true; }, "settings of the model"},
        {[](Json& j) { j["model"]["type"] = "WordPiece"; }, "settings of the model"},
    };
    for (const auto& other : others) {
        const auto& change = other.first;
        const std::string& part = other.second;
        CAPTURE(part);
        const std::string message = error(json, changed(change));
        CAPTURE(message);
        CHECK(message.find(data + ": ") == 0);
        for (const std::string& word : {model, part, std::string("; advice")})
            CHECK(message.find(word) != std::string::npos);
    }
    // With these added tokens, "normalized" decides the order in which they are looked for.
    const Json mixed = changed([](Json& j) {
        j["added_tokens"].push_back(j["added_tokens"][0]);
        j["added_tokens"][1]["content"] = "</s>", j["added_tokens"][1]["normalized"] = true;
    });
    Json turned = mixed;
    for (Json& token : turned["added_tokens"]) token["normalized"] = token["normalized"] == false;
    CHECK(error(mixed, turned).find("added tokens") != std::string::npos);
    // Kinds of tokenizers that this program does not implement, and files that no program implements.
    Json unigram = {{"model", {{"type", "Unigram"}, {"vocab", {{"a", -1.5}, {"b", -2}}}}}}, longer = unigram;
    longer["model"]["vocab"].push_back({"c", -3});
    CHECK(error(unigram, unigram) == "");
    CHECK(error(unigram, longer).find("vocabulary") != std::string::npos);
    Json split = json, within = json;
    split["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {json["pre_tokenizer"]}}};
    within["pre_tokenizer"] = split["pre_tokenizer"];
    within["pre_tokenizer"]["pretokenizers"][0].erase("use_regex");
    CHECK(error(split, within) == "");
    CHECK(error(json, Json::array()) != "");
    CHECK(error(json, {{"model", {{"vocab", 1}, {"merges", "a b"}}}, {"added_tokens", 7}}) != "");
    // If one of the files is missing, there is nothing to compare.
    const MappedFile file(model);
    require_same_tokenizer(nullptr, &file);
    require_same_tokenizer(&file, nullptr);
}

TEST_CASE("Tokenizer: thousands of damaged files load and keep text whole, or throw Error") {
    const TempFolder folder;
    const std::string path = folder / "fuzz.json", text = "abcabc <|endoftext|>\u00e9\U0001f600 'll 12\n\n x";
    const std::string good = small_json({{"a", "b"}, {"ab", "c"}, {"\u0120", "x"}}).dump();
    std::mt19937 random(11);
    int loaded = 0, refused = 0;
    for (int round = 0; round < 2000; round++) {
        std::string json = good;
        for (int edits = 1 + random() % 2; edits > 0; edits--) {
            const size_t at = random() % json.size();
            const char likely = "0123456789{}[]\",:-e ab"[random() % 22];
            switch (random() % 4) {
                case 0:
                    json[at] = (char)random();
                    break;
                case 1:
                    json[at] = likely;
                    break;
                case 2:
                    json.insert(at, 1, likely);
                    break;
                case 3:
                    json.erase(at, random() % 8 ? 1 : random() % 300);
                    break;
            }
        }
        put_file(path, json);
        try {
            const Tokenizer tokenizer(path);
            REQUIRE(tokenizer.decode(tokenizer.encode(text)) == text);
            loaded++;
        } catch (const Error&) {
            refused++;
        }
    }
    CHECK(loaded > 50);
    CHECK(refused > 500);
}
