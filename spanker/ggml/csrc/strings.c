/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Arrays of strings as GGUF stores them: where they end, and whether they are UTF-8.
 */
#include "vocabulary_internal.h"

int spk_strings_scan(const uint8_t *strings, size_t *nbytes, size_t count, int64_t *ends)
{
    struct spk_token string;
    size_t at = 0;
    for (size_t i = 0; i < count; i++) {
        if (!next_string(strings, *nbytes, &at, &string))
            return SPK_VOCABULARY_E_BOUNDS;
        if (ends)
            ends[i] = (int64_t)at;
    }
    *nbytes = at;
    return SPK_VOCABULARY_OK;
}

/* UTF-8 as the Unicode standard defines it (table 3-7): no surrogates, nothing above U+10FFFF, no
 * longer form than needed.  What may follow depends on what came: WHOLE characters, one to three
 * more bytes, or a lead that restricts the byte after it. */
enum { WHOLE, ONE, TWO, THREE, AFTER_E0, AFTER_ED, AFTER_F0, AFTER_F4, WRONG, STATES };
#define STATE_BITS 6

static unsigned next_state(unsigned state, unsigned byte)
{
    const int continues = byte >= 0x80 && byte < 0xc0;
    switch (state) {
    case WHOLE:
        if (byte < 0x80)
            return WHOLE;
        if (byte < 0xc2 || byte > 0xf4)
            return WRONG;
        return byte < 0xe0    ? ONE
               : byte == 0xe0 ? AFTER_E0
               : byte == 0xed ? AFTER_ED
               : byte < 0xf0  ? TWO
               : byte == 0xf0 ? AFTER_F0
               : byte == 0xf4 ? AFTER_F4
                              : THREE;
    case ONE: return continues ? WHOLE : WRONG;
    case TWO: return continues ? ONE : WRONG;
    case THREE: return continues ? TWO : WRONG;
    case AFTER_E0: return continues && byte >= 0xa0 ? ONE : WRONG;
    case AFTER_ED: return continues && byte < 0xa0 ? ONE : WRONG;
    case AFTER_F0: return continues && byte >= 0x90 ? TWO : WRONG;
    case AFTER_F4: return continues && byte < 0x90 ? TWO : WRONG;
    default: return WRONG;
    }
}

void spk_utf8_init(struct utf8_check *check)
{
    memset(check, 0, sizeof *check);
    for (unsigned byte = 0; byte < 256; byte++)
        for (unsigned state = 0; state < STATES; state++)
            check->rows[byte] |= (uint64_t)(STATE_BITS * next_state(state, byte))
                                 << (STATE_BITS * state);
}

int spk_utf8_valid(const struct utf8_check *check, const uint8_t *p, size_t n)
{
    uint64_t state = STATE_BITS * WHOLE;
    for (size_t i = 0; i < n; i++)
        state = check->rows[p[i]] >> (state & 63);
    return (state & 63) == STATE_BITS * WHOLE;
}
