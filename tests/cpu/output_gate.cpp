// llmc/cpu/output_gate.h, compared with the double-precision oracle.
#include "llmc/cpu/output_gate.h"

#include "tests/reference.h"

using namespace reference;
using cpu::bf16;

TEST_CASE_TEMPLATE("output_gate", Real, float, bf16) {
    for (size_t n : {1, 7, 16, 33, 4097, 70001}) {
        CAPTURE(n);
        auto inp = convert<Real>(normal(n, 1)), gate = convert<Real>(normal(n, 2, 3)),
             dout = convert<Real>(normal(n, 3));
        const double tolerance = stored<Real>();
        Vector out = output_gate_forward(to_double(inp), to_double(gate));
        check_layer({inp, gate}, {output<Real>("out", Output::overwritten, out, tolerance)},
                    [&](auto& o) { cpu::output_gate_forward<Real>(o["out"], inp.data(), gate.data(), n); });
        OutputGateGradients d = output_gate_backward(to_double(dout), to_double(inp), to_double(gate));
        const Output dgate = output<Real>("dgate", Output::overwritten, d.dgate, tolerance);
        check_layer({dout, inp, gate}, {output<Real>("dinp", Output::overwritten, d.dinp, tolerance), dgate},
                    [&](auto& o) {
                        cpu::output_gate_backward<Real>(o["dinp"], o["dgate"], dout.data(), inp.data(),
                                                        gate.data(), n);
                    });
        check_layer(
            {inp, gate}, {output("dinp", Output::in_place, d.dinp, tolerance, dout), dgate}, [&](auto& o) {
                cpu::output_gate_backward<Real>(o["dinp"], o["dgate"], o["dinp"], inp.data(), gate.data(), n);
            });
    }
}

TEST_CASE("output_gate: every gate keeps its digits, open or closed, and a NaN stays where it is") {
    for (float z : {-INFINITY, -1e30f, -80.0f, -20.0f, -0.5f, 0.0f, 0.5f, 20.0f, 80.0f, 1e30f, INFINITY}) {
        CAPTURE(z);
        const float one = 1, gate = z;
        float out, dinp, dgate;
        cpu::output_gate_forward(&out, &one, &gate, 1);
        cpu::output_gate_backward(&dinp, &dgate, &one, &one, &gate, 1);
        const OutputGateGradients d = output_gate_backward({1.0}, {1.0}, {z});
        CHECK(std::abs(out - d.dinp[0]) <= 1e-6 * d.dinp[0]);
        CHECK(out == dinp);
        CHECK(std::abs(dgate - d.dgate[0]) <= 1e-6 * d.dgate[0]);
    }
    Floats inp = {1, 2, 3}, gate = {0, NAN, 1}, out(3), dinp(3), dgate(3);
    cpu::output_gate_forward(out.data(), inp.data(), gate.data(), 3);
    cpu::output_gate_backward(dinp.data(), dgate.data(), inp.data(), inp.data(), gate.data(), 3);
    for (const Floats* x : {&out, &dinp, &dgate})
        for (int i = 0; i < 3; i++) CHECK(is_nan((*x)[i]) == (i == 1));
}
