// Pieces of arrays.
#pragma once
#include <algorithm>
#include <cstddef>
#include <type_traits>

// Elements begin .. end-1 of an array.
struct Slice {
    size_t begin, end;
    size_t size() const { return end > begin ? end - begin : 0; }
};

inline Slice overlap(Slice a, Slice b) {
    return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
}

enum class Element { f32, f64, bf16 };

constexpr size_t size_of(Element type) {
    return type == Element::f64 ? 8 : type == Element::f32 ? 4 : 2;
}

// The type of T, which is float, double or the backend's bf16.
template <class T>
constexpr Element kElement = std::is_same_v<T, float>    ? Element::f32
                             : std::is_same_v<T, double> ? Element::f64
                                                         : Element::bf16;

// Elements in the memory of a backend.
struct Span {
    void* data;
    size_t size;
    Element type;

    template <class T>
    Span(T* data, size_t size) : data(data), size(size), type(kElement<T>) {}

    char* at(size_t i) const { return (char*)data + i * size_of(type); }
};
