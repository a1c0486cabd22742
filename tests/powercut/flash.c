// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * NOR flash in memory that outlives the machine: bits go from 1 to 0, erasing a block brings the ones back, and what
 * is written is there at once. The kernel's own phram will not do: UBI refuses a device without a write buffer's size,
 * and nandsim and mtdram keep their content where a power cut takes it.
 */
#include <linux/io.h>
#include <linux/module.h>
#include <linux/mtd/mtd.h>

static unsigned long long start = 0x100000000ULL;
module_param(start, ullong, 0);
static unsigned int size = 8 << 20;
module_param(size, uint, 0);

static u8 *memory;

static int flash_erase(struct mtd_info *mtd, struct erase_info *what)
{
	memset(memory + what->addr, 0xff, what->len);
	return 0;
}

static int flash_read(struct mtd_info *mtd, loff_t from, size_t length, size_t *done, u_char *to)
{
	memcpy(to, memory + from, length);
	*done = length;
	return 0;
}

static int flash_write(struct mtd_info *mtd, loff_t to, size_t length, size_t *done, const u_char *from)
{
	for (*done = 0; *done < length; (*done)++)
		WRITE_ONCE(memory[to + *done], memory[to + *done] & from[*done]);
	return 0;
}

static struct mtd_info flash = {
	.name = "flash",
	.type = MTD_NORFLASH,
	.flags = MTD_CAP_NORFLASH,
	.erasesize = 32 << 10,
	.writesize = 1,
	.writebufsize = 64,
	.owner = THIS_MODULE,
	._erase = flash_erase,
	._read = flash_read,
	._write = flash_write,
};

static int __init flash_init(void)
{
	int error;

	memory = memremap(start, size, MEMREMAP_WB);
	if (!memory)
		return -ENOMEM;
	flash.size = size;
	error = mtd_device_register(&flash, NULL, 0);
	if (error)
		memunmap(memory);
	return error;
}

static void __exit flash_exit(void)
{
	WARN_ON(mtd_device_unregister(&flash));
	memunmap(memory);
}

module_init(flash_init);
module_exit(flash_exit);
MODULE_DESCRIPTION("NOR flash in memory that outlives the machine");
MODULE_LICENSE("Dual MIT/GPL");
