/* SPDX-License-Identifier: GPL-2.0-only */
/* Tracepoints: what a card is given, what it answers, its interrupts and resets. */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM spanker

#if !defined(SPANKER_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define SPANKER_TRACE_H

#include <linux/tracepoint.h>

TRACE_EVENT(spanker_submit,
	TP_PROTO(int card, u32 op, u32 program, u64 fence, u32 inflight),
	TP_ARGS(card, op, program, fence, inflight),
	TP_STRUCT__entry(
		__field(int, card)
		__field(u32, op)
		__field(u32, program)
		__field(u32, inflight)
		__field(u64, fence)
	),
	TP_fast_assign(
		__entry->card = card;
		__entry->op = op;
		__entry->program = program;
		__entry->inflight = inflight;
		__entry->fence = fence;
	),
	TP_printk("card=%d op=%u program=%u fence=%llu inflight=%u", __entry->card, __entry->op,
		  __entry->program, __entry->fence, __entry->inflight)
);

TRACE_EVENT(spanker_complete,
	TP_PROTO(int card, u32 op, u64 fence, int error, u32 detail, u64 busy_ns),
	TP_ARGS(card, op, fence, error, detail, busy_ns),
	TP_STRUCT__entry(
		__field(int, card)
		__field(u32, op)
		__field(int, error)
		__field(u32, detail)
		__field(u64, fence)
		__field(u64, busy_ns)
	),
	TP_fast_assign(
		__entry->card = card;
		__entry->op = op;
		__entry->error = error;
		__entry->detail = detail;
		__entry->fence = fence;
		__entry->busy_ns = busy_ns;
	),
	TP_printk("card=%d op=%u fence=%llu error=%d detail=%u busy_ns=%llu", __entry->card,
		  __entry->op, __entry->fence, __entry->error, __entry->detail, __entry->busy_ns)
);

TRACE_EVENT(spanker_reset,
	TP_PROTO(int card, u32 generation, int error),
	TP_ARGS(card, generation, error),
	TP_STRUCT__entry(
		__field(int, card)
		__field(u32, generation)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->card = card;
		__entry->generation = generation;
		__entry->error = error;
	),
	TP_printk("card=%d generation=%u error=%d", __entry->card, __entry->generation,
		  __entry->error)
);

TRACE_EVENT(spanker_irq,
	TP_PROTO(int card, u32 vector, u32 causes),
	TP_ARGS(card, vector, causes),
	TP_STRUCT__entry(
		__field(int, card)
		__field(u32, vector)
		__field(u32, causes)
	),
	TP_fast_assign(
		__entry->card = card;
		__entry->vector = vector;
		__entry->causes = causes;
	),
	TP_printk("card=%d vector=%u causes=%#x", __entry->card, __entry->vector, __entry->causes)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
